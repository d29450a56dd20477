"""SAEs in a running model: what is encoded is what is there, what is put is what the model goes on with."""

import copy
from functools import cache
from typing import Any

import pytest
import served
import tiny_models
import torch
from torch import Tensor, nn

import saefast
from saefast.errors import InputError
from saefast.models.sae import SAE

IDS = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(3))
HOOKS = (
    "layers.1", "layers.0:in", "layers.1.mlp", "layers.1.self_attn.o_proj:in", "blocks.1.attn.hook_z",
    "blocks.1.hook_resid_mid", "layers.2.self_attn",
)  # fmt: skip


@cache
def model(kind: str = "llama") -> Any:
    made = tiny_models.model(kind, head=True).double()
    made.generation_config.pad_token_id, made.generation_config.eos_token_id = 0, None
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return made


def sae(kind: str = "relu", hook: str | None = "layers.1", **more: Any) -> SAE:
    metadata = {} if hook is None else {"hook_name": hook}
    return served.sae(kind, **{"d_in": 16, "metadata": metadata, **more})


def value_at(lm: Any, path: str, side: str, put: Any = None) -> Tensor:
    """What a module takes or gives in a pass over IDS, by torch's own hooks; put: what goes on in its place."""
    seen: list[Tensor] = []

    def swapped(given: Any) -> Any:
        x = given if isinstance(given, Tensor) else given[0]
        seen.append(x)
        if put is None:
            return None
        return put(x) if isinstance(given, Tensor) else (put(x), *given[1:])

    module = lm.get_submodule(path)
    if side == "in":
        names: list[str] = ["hidden_states"]

        def pre(_m: nn.Module, args: Any, kwargs: Any) -> Any:
            new = swapped(args[0] if args else kwargs[names[0]])
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, names[0]: new})

        handle = module.register_forward_pre_hook(pre, with_kwargs=True)
    else:
        handle = module.register_forward_hook(lambda _m, _args, out: swapped(out))
    try:
        logits = lm(IDS).logits
    finally:
        handle.remove()
    return logits if put is not None else seen[0]


PLACES = {
    "layers.1": ("model.layers.1", "out"), "layers.0:in": ("model.layers.0", "in"),
    "layers.1.mlp": ("model.layers.1.mlp", "out"),
    "layers.1.self_attn.o_proj:in": ("model.layers.1.self_attn.o_proj", "in"),
    "blocks.1.attn.hook_z": ("model.layers.1.self_attn.o_proj", "in"),
    "blocks.1.hook_resid_mid": ("model.layers.1.post_attention_layernorm", "in"),
    "layers.2.self_attn": ("model.layers.2.self_attn", "out"),
}  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS)
@torch.no_grad()
def test_codes_are_of_what_is_there_and_reconstructions_go_on_from_there(hook: str) -> None:
    lm, one = model(), sae("relu", hook)
    clean, x = lm(IDS).logits, value_at(lm, *PLACES[hook])
    with saefast.encode(lm, one) as found:
        assert torch.equal(lm(IDS).logits, clean)
    acts, idx = one.encode_sparse(x)
    assert torch.equal(found[hook].acts, acts)
    assert torch.equal(found[hook].idx, idx)
    with saefast.replace(lm, one):
        replaced = lm(IDS).logits
    assert torch.equal(replaced, value_at(lm, *PLACES[hook], put=lambda x: one(x).x_hat))
    assert not torch.allclose(replaced, clean)
    with saefast.replace(lm, one, error_term=True):
        torch.testing.assert_close(lm(IDS).logits, clean, rtol=1e-6, atol=1e-6)
    assert torch.equal(lm(IDS).logits, clean)


class Block(nn.Module):
    """A block that gives a tensor, a tuple or a list, as versions of transformers do."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind, self.inner = kind, nn.Linear(16, 16, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        out = self.inner(x)
        return out if self.kind is Tensor else self.kind([out, "kept"])


class Model(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.table, self.block = nn.Embedding(66, 16, dtype=torch.float64), Block(kind)

    def forward(self, input_ids: Tensor) -> Any:
        return self.block(self.table(input_ids))


@pytest.mark.parametrize("kind", [Tensor, tuple, list])
@torch.no_grad()
def test_tensors_tuples_and_lists_stay_what_they_are(kind: type) -> None:
    lm, one = Model(kind), sae("topk", None)
    out = lm(IDS)
    x = out if kind is Tensor else out[0]
    with saefast.replace(lm, one, hook="block"), saefast.encode(lm, {"block": one}) as after:
        new = lm(IDS)
    assert isinstance(new, kind)
    x_hat = new if kind is Tensor else new[0]
    assert torch.equal(x_hat, one(x).x_hat)
    assert kind is Tensor or new[1] == "kept"
    # The second block sees what the first has put.
    assert torch.equal(after["block"].acts, one.encode_sparse(x_hat)[0])


@torch.no_grad()
def test_several_at_once_each_see_what_those_before_have_put() -> None:
    lm, first, second = model(), sae("topk"), sae("relu")
    both = {"layers.0": first, "layers.2.mlp": second}
    with saefast.replace(lm, both):
        found = lm(IDS).logits
    with saefast.replace(lm, first, hook="layers.0"), saefast.replace(lm, second, hook="layers.2.mlp"):
        assert torch.equal(lm(IDS).logits, found)
    with saefast.encode(lm, both) as codes, saefast.replace(lm, first, hook="layers.0"):
        lm(IDS)
    assert set(codes) == {"layers.0", "layers.2.mlp"}
    named = [sae("topk", "layers.0"), sae("relu", "layers.2.mlp")]
    with saefast.replace(lm, named):
        assert torch.equal(lm(IDS).logits, found)


@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_a_transcoder_reads_at_one_module_and_writes_at_another(skip: bool) -> None:
    lm = model()
    kind = "transcoder relu with a skip" if skip else "transcoder"
    one = sae(kind, "layers.1.mlp:in", d_out=16)
    one.config.metadata["hook_name_out"] = "layers.1.mlp"
    x = value_at(lm, "model.layers.1.mlp", "in")
    with saefast.replace(lm, one):
        found = lm(IDS).logits
    assert torch.equal(found, value_at(lm, "model.layers.1.mlp", "out", put=lambda _y: one(x).x_hat))
    with saefast.replace(lm, one, error_term=True):
        kept = lm(IDS).logits
    torch.testing.assert_close(kept, lm(IDS).logits, rtol=1e-6, atol=1e-6)
    wide = sae("transcoder", None, d_out=7)
    message = r"hook model\.layers\.1\.mlp gives rows of width 16, the SAE gives rows of 7"
    block = saefast.replace(lm, wide, hook="layers.1.mlp:in", target_hook="layers.1.mlp")
    with pytest.raises(InputError, match=message), block:
        lm(IDS)
    message = r"model\.layers\.0\.mlp runs before model\.layers\.1\.mlp:in, from which"
    block = saefast.replace(lm, one, hook="layers.1.mlp:in", target_hook="layers.0.mlp")
    with pytest.raises(InputError, match=message), block:
        lm(IDS)


@pytest.mark.parametrize("kind", ["crosscoder", "cross-layer transcoder"])
@torch.no_grad()
def test_what_reads_several_places_is_encoded_when_all_are_there(kind: str) -> None:
    lm, hooks = model(), ["layers.0", "layers.2"]
    widths = {"crosscode_widths": (16, 16)} if kind == "crosscoder" else {"d_out": 32}
    one = sae(kind, None, d_in=32, **widths)
    x = torch.cat([value_at(lm, f"model.{hook}", "out") for hook in hooks], -1)
    with saefast.encode(lm, one, hook=hooks) as found:
        lm(IDS)
    assert torch.equal(found["layers.0,layers.2"].acts, one.encode_sparse(x)[0])
    one.config.metadata["hook_name"] = "layers.0,layers.2"
    with saefast.encode(lm, one) as found:
        lm(IDS)
    assert torch.equal(found["layers.0,layers.2"].acts, one.encode_sparse(x)[0])
    message = "reconstructs several places at once"
    with pytest.raises(InputError, match=message), saefast.replace(lm, one, hook=hooks, target_hook=hooks):
        pass


@torch.no_grad()
def test_every_pass_of_generate_can_be_kept() -> None:
    lm, one = model(), sae("topk")
    with saefast.encode(lm, one, every_pass=True) as found:
        text = lm.generate(IDS, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(IDS))
    assert [tuple(codes["layers.1"].acts.shape) for codes in found.passes] == [(2, 9, 4), *[(2, 1, 4)] * 3]
    steps = torch.cat([codes["layers.1"].acts for codes in found.passes], 1)
    with saefast.encode(lm, one) as whole:
        lm(text[:, :-1])
    torch.testing.assert_close(steps, whole["layers.1"].acts, rtol=1e-5, atol=1e-6)
    assert len(whole.passes) == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_with_a_cache_goes_on_with_reconstructions(kind: str) -> None:
    lm, one, n = model(kind), sae("topk"), 5
    with saefast.replace(lm, one):
        text = lm.generate(IDS, max_new_tokens=n, do_sample=False, attention_mask=torch.ones_like(IDS))
    with torch.no_grad(), saefast.replace(lm, one):
        likeliest = lm(text).logits.argmax(-1)
    assert torch.equal(text[:, 9:], likeliest[:, 8:-1])


# --- gradients


def gradients(lm: Any, loss: Tensor, extra: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, [*lm.parameters(), *extra], allow_unused=True)
    return [torch.zeros(()) if one is None else one for one in found]


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu", "gated", "batchtopk", "layer norm"])
def test_gradients_in_training_are_those_of_the_definition(kind: str, error_term: bool) -> None:
    """To the SAE's parameters and through its code to the model below it; the error is a constant."""
    lm, one = model().train(), sae(kind)
    names = [one.W_enc, one.W_dec, one.b_enc, one.b_dec]

    def by_hand(x: Tensor) -> Tensor:
        x_hat = one.decode(one.encode(x), x)
        return x_hat + (x - x_hat).detach() if error_term else x_hat

    expected = gradients(lm, value_at(lm, "model.layers.1", "out", put=by_hand).logsumexp(-1).sum(), names)
    with saefast.replace(lm, one, error_term=error_term):
        found = gradients(lm, lm(IDS).logits.logsumexp(-1).sum(), names)
    lm.eval()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    assert float(found[-3].abs().max()) > 0


def test_codes_keep_their_gradients() -> None:
    lm, one = model(), sae("relu")
    with saefast.encode(lm, one) as found:
        lm(IDS)
    ours = gradients(lm, found["layers.1"].acts.sum(), [one.W_enc])
    theirs = gradients(lm, one.encode(value_at(lm, "model.layers.1", "out")).sum(), [one.W_enc])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_training_with_dropped_activations_is_the_same_step(checkpointing: bool) -> None:
    lm, one = copy.deepcopy(model()).train(), sae("topk")
    plain = gradients_of_step(lm, one)
    if checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for ours, theirs in zip(gradients_of_step(lm, one), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def gradients_of_step(lm: Any, one: SAE) -> list[Tensor]:
    with saefast.replace(lm, one), saefast.encode(lm, one, hook="layers.0") as found:
        loss = lm(IDS, labels=IDS, use_cache=False).loss
        kept = found["layers.0"]
        loss.backward()
        assert found["layers.0"] is kept
    made = [p.grad.clone() for p in [*lm.parameters(), *one.parameters()] if p.grad is not None]
    lm.zero_grad()
    one.zero_grad()
    return made


# --- other dtypes and kinds of models, and what is refused


@torch.no_grad()
def test_a_model_in_bf16_keeps_its_dtype_under_autocast_too() -> None:
    lm = copy.deepcopy(model()).to(torch.bfloat16)
    one = sae("topk", dtype="float32")
    for autocast in (False, True):
        with torch.autocast("cpu", enabled=autocast), saefast.replace(lm, one, error_term=True):
            assert lm(IDS).logits.dtype == torch.bfloat16
    x = value_at(lm, "model.layers.1", "out")
    with saefast.encode(lm, one) as found, torch.autocast("cpu"):
        lm(IDS)
    assert found["layers.1"].acts.dtype == torch.float32
    assert torch.equal(found["layers.1"].acts, one.encode_sparse(x)[0])


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(66, 16, dtype=torch.float64)
        self.block = nn.Linear(16, 16, dtype=torch.float64)
        self.never = nn.Linear(16, 16, dtype=torch.float64)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        for _ in range(3):
            x = self.block(x).tanh()
        return x


@torch.no_grad()
def test_of_a_module_that_runs_several_times_the_turn_is_named() -> None:
    lm, one = Looped(), sae("topk", None)
    with saefast.encode(lm, {"block@1": one}) as found:
        lm(IDS)
        lm(IDS)
    x = lm.block(lm.block(lm.table(IDS)).tanh())
    assert torch.equal(found["block@1"].acts, one.encode_sparse(x)[0])
    message = r"'block' runs several times in one forward pass: name the turn, block@0"
    with pytest.raises(InputError, match=message), saefast.encode(lm, {"block": one}):
        lm(IDS)
    message = r"hook 'never' never fired: .*; the block did nothing there"
    with pytest.raises(InputError, match=message), saefast.encode(lm, {"never": one}):
        lm(IDS)
    with saefast.encode(lm, {"never": one}) as empty:
        pass
    assert list(empty) == []
    with pytest.raises(InputError, match="the model has not run yet"):
        _ = empty["never"]


def test_saes_and_models_that_cannot_be_meant_are_one_line() -> None:
    lm, one = model(), sae("topk")
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(saes=[one, one]), "two have one name"),
        (dict(saes={"layers.0": "x"}), "expected an SAE under the name of its hook"),
        (dict(saes={3: one}), "expected an SAE under the name of its hook"),
        (dict(saes="layers.0"), "saes is 'layers.0'"),
        (dict(saes=[one], hook="layers.0"), "hook is given for several SAEs"),
        (dict(saes=[]), "saes is a list: expected an SAE, several, or"),
    ]  # fmt: skip
    for given, message in cases:
        with pytest.raises(InputError, match=message), saefast.encode(**(dict(model=lm, saes=one) | given)):
            pass
    twice = {"layers.0": one, "model.layers.0": one}
    with pytest.raises(InputError, match="two SAEs write one place"), saefast.replace(lm, twice):
        pass
