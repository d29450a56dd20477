"""Steering equals the long way round: encode, set the latents, decode, add what the SAE had missed."""

import copy
import re
from functools import cache
from typing import Any

import pytest
import served
import tiny_models
import torch
from torch import Tensor

import saefast
from saefast.analysis.latent_stats import FEATURE_STATS, LATENTS, max_acts, write_latent_stats
from saefast.errors import InputError
from saefast.integrations.steering import Steering, steer
from saefast.metrics.streaming import Sparsity
from saefast.models.config import SAEConfig
from saefast.models.registry import ACTIVATIONS, LAYERS
from saefast.models.sae import SAE

SETTINGS: dict[str, Any] = {"clamp": {3: 5.0, 40: -2.0, 17: 0.5}, "add": {3: 5.0, 40: -2.0}, "scale": {3: 2.5, 17: 0.0}}
SETTINGS["ablate"] = [3, 40, 17]
IDS = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(3))


def changed(f: Tensor, latents: Any, mode: str) -> Tensor:
    """Dense activations f (..., L) as a mode changes them."""
    f = f.clone()
    for latent in latents:
        v = 0.0 if mode == "ablate" else latents[latent]
        old = f[..., latent]
        f[..., latent] = {"clamp": torch.full_like(old, v), "add": old + v, "scale": old * v, "ablate": old * 0}[mode]
    return f


def long_way(sae: SAE, x: Tensor, y: Tensor, latents: Any, mode: str, error_term: bool) -> Tensor:
    f = sae.encode(x)
    new = sae.decode(changed(f, latents, mode), x)
    return new + (y - sae.decode(f, x)) if error_term else new


def target(sae: SAE, x: Tensor) -> Tensor:
    return torch.randn(*x.shape[:-1], sae.d_out, dtype=x.dtype) if sae.architecture.has_target else x


def test_the_kinds_are_all_that_serve() -> None:
    configs = [served.sae(kind).config for kind in served.KINDS]
    assert {config.activation for config in configs} == set(ACTIVATIONS)
    assert all(any(layer.wanted(config) for config in configs) for layer in LAYERS)


@pytest.mark.parametrize("error_term", [True, False])
@pytest.mark.parametrize("mode", SETTINGS)
@pytest.mark.parametrize("kind", served.KINDS)
@torch.no_grad()
def test_steering_is_the_long_way_round(kind: str, mode: str, error_term: bool) -> None:
    sae = served.sae(kind)
    x = served.rows(sae, 3, 20)
    y = target(sae, x)
    found = Steering(sae, SETTINGS[mode], mode=mode, error_term=error_term)(x, y)
    expected = long_way(sae, x, y, SETTINGS[mode], mode, error_term)
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert (expected - y).abs().max() > 0.1, "nothing was changed, so nothing was tested"


@pytest.mark.parametrize("kind", served.KINDS)
def test_activations_of_some_latents_are_those_of_all(kind: str) -> None:
    sae = served.sae(kind)
    latents = torch.tensor([40, 3, 17, 0, 47])
    x = served.rows(sae, 5, 40)
    found, expected = sae.encode_latents(x, latents), sae.encode(x)[..., latents]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert (expected > 0).any(dim=(0, 1)).sum() >= 3, "hardly any was on, so nothing was tested"


@pytest.mark.parametrize("kind", served.KINDS)
def test_latents_that_are_on_by_themselves_are_read_alone(kind: str) -> None:
    """NaN in all other rows of W_enc and W_dec harms nothing where each latent is on by itself, and shows elsewhere."""
    sae = served.sae(kind)
    x, latents = served.rows(sae, 30), torch.tensor([40, 3])
    y = target(sae, x)
    before = Steering(sae, {40: 2.0, 3: 1.0})(x, y)
    others = torch.ones(served.L, dtype=torch.bool)
    others[latents] = False
    with torch.no_grad():
        sae.W_enc[others] = sae.W_dec[others] = sae.b_enc[others] = torch.nan
    after = Steering(sae, {40: 2.0, 3: 1.0})(x, y)
    assert torch.equal(before, after) == (kind in served.ALONE)


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "layer norm relu", "batchtopk in norms", "transcoder"])
def test_derivatives_are_those_of_the_long_way(kind: str) -> None:
    sae, latents = served.sae(kind), SETTINGS["clamp"]
    inputs = served.rows(sae, 12).requires_grad_()
    y = target(sae, inputs)
    weight = torch.randn(12, sae.d_out, dtype=torch.float64)
    names = ("W_enc", "W_dec", "b_enc")
    ours, theirs = (
        torch.autograd.grad((made * weight).sum(), [inputs, *(getattr(sae, name) for name in names)])
        for made in (Steering(sae, latents)(inputs, y), long_way(sae, inputs, y, latents, "clamp", True))
    )
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_bf16_activations_of_a_fp32_sae_keep_their_dtype_and_small_values_stay_exact() -> None:
    sae = served.sae("relu", dtype="float32")
    x = served.rows(sae, 50).bfloat16()
    found = Steering(sae, {3: 4.0})(x)
    assert found.dtype == torch.bfloat16
    f = sae.encode(x)[:, [3]]
    assert torch.equal(found, (x.float() + (4.0 - f) @ sae.W_dec[[3]]).bfloat16())
    # v = f is no change at all.
    assert torch.equal(Steering(sae, {3: 1.0}, mode="scale")(x), x)


# --- in a model


@cache
def model(kind: str = "llama") -> Any:
    made = tiny_models.model(kind, head=True).double()
    made.generation_config.pad_token_id, made.generation_config.eos_token_id = 0, None
    with torch.no_grad():
        # Larger than models begin with, so that tokens differ.
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return made


def sae_at(hook: str, d_in: int = 16, **more: Any) -> SAE:
    return served.sae("relu", d_in=d_in, metadata={"hook_name": hook}, **more).requires_grad_(False)


@pytest.mark.parametrize(
    ("hook", "error_term"),
    [("layers.1", True), ("layers.1", False), ("layers.1.mlp", False), ("layers.1.self_attn.o_proj:in", True)],
)
@torch.no_grad()
def test_a_model_runs_on_with_what_the_long_way_gives(hook: str, error_term: bool) -> None:
    lm, sae = model(), sae_at(hook)
    clean = lm(IDS).logits
    with steer(lm, sae, {3: 9.0, 17: -4.0}, error_term=error_term):
        found = lm(IDS).logits

    def change(acts: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
        f = torch.zeros(*acts.shape[:2], served.L, dtype=acts.dtype).scatter(-1, idx.long(), acts)
        return changed(f, {3: 9.0, 17: -4.0}, "clamp"), torch.arange(served.L).expand(f.shape).int()

    with saefast.replace(lm, sae, error_term=error_term, change=change):
        expected = lm(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(clean.abs().max()))
    assert (found - clean).abs().max() > 1e-2 * clean.abs().max()
    assert torch.equal(lm(IDS).logits, clean)


POSITIONS = ("all", "prompt", "generated", 2, -1, (0, -2), slice(-1, None), slice(1, 4))


@pytest.mark.parametrize(("kind", "positions"), [*(("llama", one) for one in POSITIONS), ("gpt2", "all"), ("gpt2", -1)])
def test_generate_with_a_cache_is_generate_without_one(kind: str, positions: Any) -> None:
    """With a cache it sees one position at a time. Read in one pass, with the same tokens steered, each of those
    generated is the likeliest after those before it."""
    lm, sae, n = model(kind), sae_at("layers.1"), 6
    with steer(lm, sae, {3: 9.0}, positions=positions):
        found = lm.generate(IDS, max_new_tokens=n, do_sample=False, attention_mask=torch.ones_like(IDS))
    T = IDS.shape[1]
    every = list(range(T + n))
    steered = {"all": every, "prompt": every[:T], "generated": every[T:], 2: [2], -1: [T - 1], (0, -2): [0, T - 2]}
    if isinstance(positions, slice):
        wanted = every[T - 1 :] if positions.start == -1 else every[1:4]
    else:
        wanted = steered[positions]
    where = torch.zeros_like(found, dtype=torch.bool)
    where[:, wanted] = True
    with torch.no_grad(), steer(lm, sae, {3: 9.0}, positions=where):
        likeliest = lm(found).logits.argmax(-1)
    assert torch.equal(found[:, T:], likeliest[:, T - 1 : -1])
    if positions == "all":
        assert not torch.equal(found, lm.generate(IDS, max_new_tokens=n, do_sample=False))


@pytest.mark.parametrize(
    ("kind", "positions"),
    [("llama", "all"), ("llama", 0), ("llama", slice(1, None)), ("gpt2", "generated"), ("gpt2", -1)],
)
def test_padding_changes_nothing_and_counts_in_no_position(kind: str, positions: Any) -> None:
    lm, sae = model(kind), sae_at("layers.1")
    texts = [IDS[0], IDS[1, :4]]
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :5] = 0
    padded = torch.stack([texts[0], torch.cat([torch.zeros(5, dtype=torch.int64), texts[1]])])
    with steer(lm, sae, {3: 9.0}, positions=positions):
        together = lm.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False)[:, 9:]
        alone = [lm.generate(text[None], attention_mask=torch.ones_like(text[None]), max_new_tokens=4, do_sample=False)
                 for text in texts]  # fmt: skip
    for row, one, text in zip(together, alone, texts, strict=True):
        assert torch.equal(row, one[0, len(text) :])


@torch.no_grad()
def test_tokens_can_be_left_as_they_are() -> None:
    lm, sae = model(), sae_at("layers.1")
    special = IDS[0, [2, 5]].tolist()
    where = ~torch.isin(IDS, torch.tensor(special))
    with steer(lm, sae, {3: 9.0}, skip_ids=special):
        found = lm(IDS).logits
    with steer(lm, sae, {3: 9.0}, positions=where):
        assert torch.equal(lm(IDS).logits, found)
    with steer(lm, sae, {3: 9.0}):
        assert not torch.equal(lm(IDS).logits, found)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_model_in_training_are_those_of_the_steered_sum(checkpointing: bool) -> None:
    """x' = x + v d has the derivative of the model's own rest; by hand with torch's hook."""
    lm, sae = copy.deepcopy(model("gpt2")).train(), sae_at("layers.1")
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def gradients() -> list[Tensor]:
        lm.zero_grad()
        lm(IDS, labels=IDS, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in lm.parameters()]

    with steer(lm, sae, {3: 9.0, 5: 1.0}, mode="add"):
        found = gradients()
    added = 9.0 * sae.W_dec[3] + sae.W_dec[5]
    block = lm.get_submodule("transformer.h.1")
    handle = block.register_forward_hook(
        lambda _m, _a, out: out + added if isinstance(out, Tensor) else (out[0] + added, *out[1:])
    )
    expected = gradients()
    handle.remove()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_a_transcoder_is_steered_where_it_writes_by_what_it_reads() -> None:
    lm = model()
    sae = served.sae("transcoder relu with a skip", d_in=16, d_out=16).requires_grad_(False)
    sae.config.metadata.update(hook_name="layers.1.mlp:in", hook_name_out="layers.1.mlp")
    mlp, seen = lm.get_submodule("model.layers.1.mlp"), []
    handle = mlp.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    lm(IDS)
    handle.remove()
    ((x, y),) = seen
    expected = long_way(sae, x, y, {3: 9.0}, "clamp", True)
    with steer(lm, sae, {3: 9.0}):
        after = []
        handle = mlp.register_forward_hook(lambda _m, _args, out: after.append(out))
        lm(IDS)
        handle.remove()
    torch.testing.assert_close(after[0], expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_blocks_add_up_at_one_place_and_at_several() -> None:
    lm, first, second = model(), sae_at("layers.0"), sae_at("layers.1")
    both = steer(lm, first, {3: 9.0}, mode="add"), steer(lm, first, {5: 2.0}, mode="add")
    with both[0], both[1], steer(lm, second, [7], mode="ablate"):
        found = lm(IDS).logits
    with steer(lm, first, {3: 9.0, 5: 2.0}, mode="add"), steer(lm, second, {7: 0.0}):
        torch.testing.assert_close(lm(IDS).logits, found, rtol=1e-6, atol=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.modules())


def test_nothing_is_left_on_the_model_after_an_error() -> None:
    lm = model()
    with pytest.raises(ZeroDivisionError), steer(lm, sae_at("layers.1"), {3: 9.0}):
        raise ZeroDivisionError
    narrow, message = served.sae("relu"), r"hook model\.layers\.1 gives rows of width 16, the SAE takes rows of 12"
    with pytest.raises(InputError, match=message), steer(lm, narrow, {3: 9.0}, hook="layers.1"):
        lm(IDS)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.modules())


# --- units


def stats(folder: Any, name: str, largest: list[float]) -> None:
    sparsity = Sparsity(served.L)
    sparsity.max_act[: len(largest)] = torch.tensor(largest, dtype=torch.float64)
    write_latent_stats(folder / name, sparsity)


def test_values_in_units_of_the_largest_activation(tmp_path: Any) -> None:
    sae = sae_at("layers.1")
    sae.save(tmp_path)
    stats(tmp_path, LATENTS, [0.5, 0.0, 2.0, 4.0])
    stats(tmp_path, FEATURE_STATS, [0.25, 0.0, 3.0])
    assert max_acts(tmp_path, served.L)[:4].tolist() == [0.5, 0.0, 3.0, 4.0]
    x = served.rows(sae, 5)
    expected = Steering(sae, {3: 8.0, 2: -3.0})(x)
    asked: dict[str, Any] = dict(unit="max")
    assert torch.equal(Steering(sae, {3: 2.0, 2: -1.0}, max_acts=tmp_path, **asked)(x), expected)
    given = torch.full((served.L,), 4.0)
    given[2] = 3.0
    assert torch.equal(Steering(sae, {3: 2.0, 2: -1.0}, max_acts=given, **asked)(x), expected)
    lm = model()
    with torch.no_grad(), steer(lm, tmp_path, {3: 2.0}, **asked) as steering:
        found = lm(IDS).logits
    assert steering.values.tolist() == [8.0]
    with torch.no_grad(), steer(lm, sae, {3: 8.0}):
        assert torch.equal(lm(IDS).logits, found)
    with pytest.raises(InputError, match=r"latent 1 has a largest activation of 0\.0: it never fired"):
        Steering(sae, {1: 2.0}, max_acts=tmp_path, **asked)


def test_evaluation_and_features_leave_the_largest_activations(tmp_path: Any) -> None:
    sparsity = Sparsity(3)
    sparsity.update(torch.tensor([[0.5, 0.0], [2.0, 1.0]]), torch.tensor([[0, 1], [2, 0]]))
    write_latent_stats(tmp_path / FEATURE_STATS, sparsity)
    assert max_acts(tmp_path, 3).tolist() == [1.0, 0.0, 2.0]
    with pytest.raises(InputError, match=r"a max_act of shape \(3,\).*expected \(4,\)"):
        max_acts(tmp_path, 4)
    with pytest.raises(InputError, match=r"holds neither latents\.safetensors nor feature_stats\.safetensors"):
        max_acts(tmp_path / "elsewhere", 3)


# --- bad input

SMALL = SAE(SAEConfig(d_in=4, n_latents=8, k=2, activation="relu"), seed=0)
REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(latents={8: 1.0}), r"latents has 8: expected ids from 0 to 7"),
    (dict(latents={-1: 1.0}), r"latents has -1: expected ids"),
    (dict(latents={}), r"latents is \{\}: expected \{latent: value\}"),
    (dict(latents=[3]), r"mode 'clamp' needs a value for each"),
    (dict(latents={3: float("nan")}), r"the value of latent 3 is nan: expected a finite number"),
    (dict(latents={3: "1"}), r"the value of latent 3 is '1': expected"),
    (dict(latents={"3": 1.0}), r"a key of latents is '3': expected"),
    (dict(latents=[3, 3], mode="ablate"), r"one is named twice"),
    (dict(latents={3: 2.0}, mode="ablate"), r"mode 'ablate' sets activations to 0: give \[3\], or use mode 'clamp'"),
    (dict(latents={3: 2.0}, mode="scale", unit="max"), r"unit is 'max', which mode 'scale' has not"),
    (dict(latents={3: 2.0}, unit="max"), r"the largest activations are not known: give the folder of a run"),
    (dict(latents={3: 2.0}, unit="max", max_acts=torch.ones(5)), r"max_acts is .*\(5,\): expected \(8,\) floats"),
    (dict(latents={3: 2.0}, mode="set"), r"mode is 'set'.*: expected 'clamp' or"),
    (dict(latents={3: 2.0}, unit="rel"), r"unit is 'rel'.*: expected 'abs' or"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_cannot_be_meant_is_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Steering(SMALL, **given)


def test_models_saes_and_positions_that_cannot_be_meant_are_one_line() -> None:
    lm, sae = model(), sae_at("layers.1")
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(model="gpt2"), "model is a str: expected a model of transformers or TransformerLens"),
        (dict(sae=served.sae("relu", d_in=16)), "hook is None, and the SAE's metadata has no hook_name"),
        (dict(hook="layers.9"), r"hook 'layers\.9' is no module of LlamaForCausalLM; nearest: model\.layers\.0"),
        (dict(hook="layers.1@-1"), "counts turns from the last"),
        (dict(positions="last"), "positions is 'last': expected 'all', 'prompt', 'generated'"),
        (dict(positions=slice(0, 4, 2)), "a slice without a step"),
        (dict(positions=2.5), "positions is '2.5'"),
        (dict(positions=torch.ones(2, 3)), "positions is .*bool tensor"),
        (dict(skip_ids=["a"]), "skip_ids is .*: expected ids of tokens"),
        (dict(sae=served.sae("crosscoder", crosscode_widths=(8, 8), d_in=16), hook=["layers.0", "layers.1"]),
         "reconstructs several places at once"),
    ]  # fmt: skip
    for given, message in cases:
        asked = dict(model=lm, sae=sae, latents={3: 1.0}) | given
        with pytest.raises(InputError, match=message), steer(**asked):
            pass
    message, narrow = r"positions has shape \(1, 9\), the model reads \(2, 9\) tokens", torch.ones(1, 9).bool()
    with pytest.raises(InputError, match=message), steer(lm, sae, {3: 1.0}, positions=narrow):
        lm(IDS)
    compiled = torch.nn.Module()  # what torch.compile gives is one with the model under this name
    compiled._orig_mod = lm
    with pytest.raises(InputError, match="model is compiled"), steer(compiled, sae, {3: 1.0}):
        pass
    residual = sae_at("layers.1")
    residual.config.metadata["residual_of"] = {"run": "runs/a"}
    message = "trained on what the SAE of runs/a leaves over"
    with pytest.raises(InputError, match=message), steer(lm, residual, {3: 1.0}):
        pass
    assert re.search("transcoder", _message(lambda: Steering(served.sae("transcoder"), {3: 1.0})(torch.ones(2, 12))))


def _message(call: Any) -> str:
    with pytest.raises(InputError) as refused:
        call()
    return str(refused.value)
