"""The same blocks on TransformerLens' own models: HookedTransformer and TransformerBridge, beside transformers'.

`make peers` runs this where TransformerLens is installed.
"""

from pathlib import Path
from typing import Any

import pytest
import served
import tiny_models
import torch
from torch import Tensor

import saefast
from saefast.harvest.language_models import load_tokenizer
from saefast.integrations.steering import Steering

pytestmark = pytest.mark.peers
IDS = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(3))
KINDS = ["hooked", "bridge"]
# A place by TransformerLens' name and as transformers' module.
PLACES = {
    "blocks.1.hook_resid_post": "h.1",
    "blocks.1.hook_resid_pre": "h.1:in",
    "blocks.1.attn.hook_z": "h.1.attn.c_proj:in",
    "blocks.1.hook_mlp_out": "h.1.mlp",
}


@pytest.fixture(scope="module")
def plain() -> Any:
    made = tiny_models.model("gpt2", head=True)
    made.config.architectures = ["GPT2LMHeadModel"]
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return made


@pytest.fixture(scope="module", params=KINDS)
def lens(request: pytest.FixtureRequest, plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = pytest.importorskip("transformer_lens")
    folder = str(tmp_path_factory.mktemp("model"))
    tiny_models.tokenizer(special=False).save_pretrained(folder)
    plain.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        if request.param == "bridge":
            bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
            return bridge.boot_transformers(folder, device="cpu")
        # It asks the hub for the config of the name.
        plain.config.n_ctx = 64
        loading = pytest.importorskip("transformer_lens.loading_from_pretrained")
        patch.setattr(loading.AutoConfig, "from_pretrained", lambda *_, **__: plain.config)
        return library.HookedTransformer.from_pretrained_no_processing(
            "gpt2", hf_model=plain, tokenizer=load_tokenizer(folder), device="cpu"
        )


def run(model: Any) -> Tensor:
    out = model(IDS)
    return out if isinstance(out, Tensor) else out.logits


def sae(hook: str) -> Any:
    return served.sae("relu", d_in=16, dtype="float32", metadata={"hook_name": hook}).requires_grad_(False)


@pytest.mark.parametrize("name", PLACES)
@torch.no_grad()
def test_codes_and_replacements_are_those_of_transformers(lens: Any, plain: Any, name: str) -> None:
    theirs, ours = sae(name), sae(PLACES[name])
    clean = run(lens)
    with saefast.encode(lens, theirs) as found, saefast.encode(plain, ours) as expected:
        assert torch.equal(run(lens), clean)
        run(plain)
    codes = [one.decode_sparse(*code) for one, code in ((theirs, found[name]), (ours, expected[PLACES[name]]))]
    torch.testing.assert_close(*codes, rtol=1e-3, atol=1e-3)
    with saefast.replace(lens, theirs), saefast.replace(plain, ours):
        torch.testing.assert_close(run(lens).log_softmax(-1), run(plain).log_softmax(-1), rtol=1e-3, atol=1e-3)
    with saefast.replace(lens, theirs, error_term=True):
        torch.testing.assert_close(run(lens), clean, rtol=1e-3, atol=1e-3)
    assert torch.equal(run(lens), clean)


@torch.no_grad()
def test_steering_is_a_hook_of_their_own_and_run_with_hooks_sees_it(lens: Any) -> None:
    name = "blocks.1.hook_resid_post"
    one, clean = sae(name), run(lens)
    steering = Steering(one, {3: 9.0})
    expected = lens.run_with_hooks(IDS, fwd_hooks=[(name, lambda act, hook: steering(act))])
    with saefast.steer(lens, one, {3: 9.0}):
        assert torch.equal(run(lens), expected)
        # Goes past the hooks on the model as a whole.
        assert torch.equal(lens.run_with_hooks(IDS, fwd_hooks=[]), expected)
        _, cache = lens.run_with_cache(IDS)
    torch.testing.assert_close(one.encode(cache[name])[..., 3], steering.sae.encode(cache[name])[..., 3])
    assert not torch.equal(expected, clean)
    assert torch.equal(run(lens), clean)
    for positions in (0, "prompt", slice(2, 5)):
        where = torch.zeros_like(IDS, dtype=torch.bool)
        where[:, positions if not isinstance(positions, str) else slice(None)] = True
        with saefast.steer(lens, one, {3: 9.0}, positions=where):
            expected = run(lens)
        with saefast.steer(lens, one, {3: 9.0}, positions=positions):
            assert torch.equal(run(lens), expected)


@torch.no_grad()
def test_generate_with_their_cache_is_steered_token_by_token(lens: Any) -> None:
    one = sae("blocks.1.hook_resid_post")
    asked: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, verbose=False, stop_at_eos=False)
    for positions in ("all", -1, "generated"):
        with saefast.steer(lens, one, {3: 9.0}, positions=positions):
            found = lens.generate(IDS, use_past_kv_cache=True, **asked)
        where = torch.zeros_like(found, dtype=torch.bool)
        where[:, {"all": slice(None), -1: slice(8, 9), "generated": slice(9, None)}[positions]] = True
        with saefast.steer(lens, one, {3: 9.0}, positions=where):
            out = lens(found)
        assert torch.equal(found[:, 9:], out.argmax(-1)[:, 8:-1]), positions


@torch.no_grad()
def test_rows_are_recorded_of_their_models(lens: Any, tmp_path: Path) -> None:
    names = {name: sae(name) for name in ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")}
    with saefast.record(lens, names, tmp_path / "codes"):
        run(lens)
        lens.run_with_hooks(IDS, fwd_hooks=[])
    codes = saefast.RecordedCodes(tmp_path / "codes")
    (rows,) = codes.shards()
    assert torch.equal(rows.ids, IDS.int().flatten().repeat(2))
    assert rows.seq.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(rows.pos, torch.arange(9).int().repeat(4))
