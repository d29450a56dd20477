"""`saefast steer`: what it prints is what the model writes, and what it cannot do is one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import served
import tiny_models
import torch

import saefast
from saefast.analysis.latent_stats import LATENTS, write_latent_stats
from saefast.cli import main as cli
from saefast.cli.steer import side_by_side
from saefast.harvest.language_models import load_model, load_tokenizer
from saefast.metrics.streaming import Sparsity

Run = Callable[..., tuple[int, str, str]]
PROMPT = "w1 w2 w3 w9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and an SAE whose latent 3 writes towards one token wherever it is set."""
    made = tmp_path_factory.mktemp("steer")
    lm = tiny_models.model("llama", head=True)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
        # No other row is as much along this one as itself.
        lm.lm_head.weight[20] *= 1.1 * float(lm.lm_head.weight.norm(dim=1).max() / lm.lm_head.weight[20].norm())
    lm.generation_config.eos_token_id = None
    lm.save_pretrained(made / "lm")
    tiny_models.tokenizer(special=False).save_pretrained(made / "lm")
    tiny_models.model("bert", head=True).save_pretrained(made / "bert")
    sae = served.sae(
        "relu", d_in=16, dtype="float32", metadata={"hook_name": "layers.2", "exclude_special_tokens": True}
    )
    with torch.no_grad():
        sae.W_dec[3] = lm.lm_head.weight[20]
    sae.save(made / "sae")
    sparsity = Sparsity(served.L)
    sparsity.max_act[3] = 50.0
    write_latent_stats(made / "sae" / LATENTS, sparsity)
    return made


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> Run:
    monkeypatch.chdir(folder)

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["steer", *argv, "--device", "cpu", "--width", "81", "--new-tokens", "6"])
        return code, *capsys.readouterr()

    return call


def columns(out: str) -> tuple[list[str], list[str]]:
    """The words below the two titles."""
    lines = [line.split("│") for line in out.splitlines() if "│" in line]
    assert [one.strip() for one in lines[0]] == ["before", "steered"]
    left, right = (" ".join(line[side] for line in lines[2:]).split() for side in (0, 1))
    return left, right


def written(folder: Path, latents: Any, **how: Any) -> list[str]:
    lm, tokenizer = load_model(folder / "lm", head="AutoModelForCausalLM"), load_tokenizer(folder / "lm")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with saefast.steer(lm, folder / "sae", latents, skip_ids=tokenizer.all_special_ids, **how):
        out = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).split()


@pytest.mark.parametrize(
    ("flags", "latents", "how"),
    [
        (["3=200"], {3: 200.0}, {}),
        (["3=200", "5=-1.5"], {3: 200.0, 5: -1.5}, {"mode": "add"}),
        (["3=4"], {3: 4.0}, {"unit": "max"}),
        (["3", "5"], [3, 5], {"mode": "ablate"}),
        (["3=200"], {3: 200.0}, {"error_term": False}),
        (["3=200"], {3: 200.0}, {"positions": "prompt"}),
    ],
)
def test_both_columns_are_what_the_model_writes(
    run: Run, folder: Path, flags: list[str], latents: Any, how: dict[str, Any]
) -> None:
    options = [word for name, value in how.items() for word in (f"--{name.replace('_', '-')}", value)]
    options = ["--no-error-term"] if "error_term" in how else options
    code, out, err = run("lm", "sae", "--set", *flags, "--prompt", PROMPT, *options)
    assert (code, err) == (0, "")
    before, after = columns(out)
    assert before == written(folder, {3: 0.0}, mode="add")
    assert after == written(folder, latents, **how)
    if how == {"unit": "max"} or not how:
        assert after == ["w15"] * 6, "the token that latent 3 writes towards"
        assert before != after
        assert "latent 3: up to " in out
        assert "on the prompt, is set to 200" in out
        assert "times the length of the prompt's activations at layers.2" in out


def test_several_prompts_and_drawn_tokens(run: Run) -> None:
    asked = ["lm", "sae", "--set", "3=5", "--prompt", PROMPT, "w7 w8", "--temperature", "2.0", "--seed", "4"]
    code, out, _ = run(*asked)
    assert code == 0
    assert out.count("before") == 2
    assert run(*asked)[1] == out
    assert run(*asked[:-1], "5")[1] != out


def test_columns_of_a_page() -> None:
    page = side_by_side(("before", "a b c\nd"), ("steered", "x" * 30), 43)
    assert page == [
        "before               │ steered", f"{'─' * 20} │ {'─' * 20}", f"a b c                │ {'x' * 20}",
        f"d                    │ {'x' * 10}",
    ]  # fmt: skip
    assert max(map(len, side_by_side(("a", "word " * 40), ("b", "word " * 40), 80))) <= 80


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lm", "sae", "--prompt", "w1"], "--set is missing: say which latents"),
        (["lm", "sae", "--set", "3=1"], "--prompt is missing: give a text"),
        (["lm", "sae", "--set", "3", "--prompt", "w1"], "--set 3 gives latent 3 no value: expected 3=VALUE"),
        (["lm", "sae", "--set", "a=1", "--prompt", "w1"], "--set a=1: expected LATENT=VALUE"),
        (["lm", "sae", "--set", "3=1", "3=2", "--prompt", "w1"], "--set names latent 3 twice"),
        (["lm", "sae", "--set", "48=1", "--prompt", "w1"], "latents has 48: expected ids from 0 to 47"),
        (["lm", "sae", "--set", "3=nan", "--prompt", "w1"], "the value of latent 3 is nan"),
        (["lm", "sae", "--set", "5=1", "--unit", "max", "--prompt", "w1"], "latent 5 has a largest activation of 0"),
        (["lm", "sae", "--set", "3=1", "--temperature", "-1", "--prompt", "w1"], "temperature is -1.0: expected"),
        (["lm", "sae", "--set", "3=1", "--hook", "layers.9", "--prompt", "w1"], "hook 'layers.9' is no module of"),
        (["lm", "nowhere", "--set", "3=1", "--prompt", "w1"], "nowhere"),
        (["nowhere", "sae", "--set", "3=1", "--prompt", "w1"], "nowhere"),
        (["bert", "sae", "--set", "3=1", "--prompt", "w1"], "bert is a BertForMaskedLM, which has no language-model"),
        (["lm", "sae", "--set", "3=1", "--prompt", " "], "no token to this tokenizer"),
        (["lm", "sae", "--set", "3=1", "--mode", "set", "--prompt", "w1"], "set"),
    ],
)  # fmt: skip
def test_what_cannot_be_steered_is_one_line(run: Run, words: list[str], message: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (cli.BAD_INPUT, "")
    assert err.count("\n") == 1
    assert err.startswith("saefast: error: ")
    assert message in err
