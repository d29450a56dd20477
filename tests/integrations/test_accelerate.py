"""accelerate() and what it is made of, without the peers: stand-ins have the names, parameters and formulas of theirs.

`tests/integrations/test_accelerate_peers.py` holds all of it to the peers' own objects.
"""

import copy
import dataclasses
import gc
import importlib
import pickle
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import saefast
from saefast import ops
from saefast.errors import InputError
from saefast.integrations import accelerate_gradients as gradients
from saefast.integrations import accelerate_ops
from saefast.integrations.accelerate_jumprelu import jump, step
from saefast.integrations.accelerate_optimizer import fuse, unfuse
from saefast.integrations.accelerate_state import Later, with_late_field, with_late_item
from saefast.ops.code import Code

B, D, L, K = 20, 9, 48, 5
F64: dict[str, Any] = dict(dtype=torch.float64)


def rows(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(*(shape or (B, D)), generator=torch.Generator().manual_seed(seed), **F64)


class EncoderOutput(NamedTuple):
    top_acts: Tensor
    top_indices: Tensor
    pre_acts: Tensor


class ForwardOutput(NamedTuple):
    sae_out: Tensor
    latent_acts: Tensor
    latent_indices: Tensor
    fvu: Tensor
    auxk_loss: Tensor
    multi_topk_fvu: Tensor


class SparseCoder(nn.Module):
    """The parameters of sparsify's."""

    def __init__(self, k: int = K, **cfg: Any) -> None:
        super().__init__()
        self.num_latents = L
        self.cfg = types.SimpleNamespace(**(dict(k=k, activation="topk", multi_topk=False, transcode=False) | cfg))
        self.encoder = nn.Linear(D, L, **F64)
        self.W_dec = nn.Parameter(rows(1, L, D))
        self.b_dec, self.W_skip = nn.Parameter(rows(2, D)), None
        self.dtype = torch.float64

    def encode(self, x: Tensor) -> Any:
        raise AssertionError("this is what accelerate() replaces")

    decode = forward = remove_gradient_parallel_to_decoder_directions = encode


class AutoEncoderTopK(nn.Module):
    """dictionary_learning's, which keeps its decoder's matrix (D, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.tensor(K, dtype=torch.int32))
        self.register_buffer("threshold", torch.tensor(-1.0, dtype=torch.float32))
        self.decoder = nn.Linear(L, D, bias=False, **F64)
        self.encoder = nn.Linear(D, L, **F64)
        # Which leaves it lying as the decoder's matrix does.
        self.encoder.weight.data = self.decoder.weight.T.clone()
        self.b_dec = nn.Parameter(rows(2, D))

    def encode(self, x: Tensor) -> Tensor:
        post = self.encoder(x - self.b_dec).relu()
        found = post.topk(K, sorted=False)
        return torch.zeros_like(post).scatter_(-1, found.indices, found.values)

    def decode(self, x: Tensor) -> Tensor:
        return self.decoder(x) + self.b_dec

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        f = self.encode(x)
        return (self.decode(f), f) if output_features else self.decode(f)


class GatedAutoEncoder(nn.Module):
    pass


HOMES = {
    "sparsify.sparse_coder": (SparseCoder, EncoderOutput, ForwardOutput),
    "dictionary_learning.trainers.top_k": (AutoEncoderTopK,),
    "dictionary_learning.dictionary": (GatedAutoEncoder,),
}


@pytest.fixture(autouse=True)
def standing_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes above are their packages', at versions that are known."""
    for name, kinds in HOMES.items():
        module = types.ModuleType(name)
        for kind in kinds:
            setattr(module, kind.__name__, kind)
            monkeypatch.setattr(kind, "__module__", name)
        monkeypatch.setitem(sys.modules, name, module)
        for package in (name.split(".")[0], name.rpartition(".")[0]):
            monkeypatch.setitem(sys.modules, package, sys.modules.get(package, types.ModuleType(package)))
    monkeypatch.setattr(accelerating_module(), "installed_version", version)


def accelerating_module() -> Any:
    # `saefast.accelerate` is the function.
    return importlib.import_module("saefast.integrations.accelerate")


def version(distribution: str) -> str:
    return {"eai-sparsify": "1.3.3", "dictionary-learning": "0.1.0", "sae-lens": "6.54.12"}[distribution]


def dense_loss(coder: Any, x: Tensor, y: Tensor, dead: Tensor) -> Tensor:
    """sparsify's losses, all with the gradients of what they say."""
    pre = linear(x if coder.cfg.transcode else x - coder.b_dec, coder.encoder.weight, coder.encoder.bias)

    def decoded(pre: Tensor, k: int) -> Tensor:
        acts, idx = pre.relu().topk(k)
        return torch.zeros_like(pre).scatter(1, idx, acts) @ coder.W_dec

    variance = (y - y.mean(0)).square().sum()
    e = y - decoded(pre, coder.cfg.k) - coder.b_dec
    k_aux = D // 2
    e_hat = decoded(torch.where(dead, pre, -1e9), k_aux)
    loss = e.square().sum() / variance + (e_hat - e.detach()).square().sum() / variance / 32
    if coder.cfg.multi_topk:
        loss = loss + (y - decoded(pre, 4 * coder.cfg.k) - coder.b_dec).square().sum() / variance / 8
    return loss


@pytest.mark.parametrize("cfg", [{}, dict(k=L - 3), dict(multi_topk=True), dict(transcode=True)], ids=str)
def test_a_coder_trains_on_the_gradients_of_its_loss(cfg: dict[str, Any]) -> None:
    """Those of AuxK and MultiTopK too, and none where ReLU clipped."""
    coder, (x, y), dead = SparseCoder(**cfg), (rows(3), rows(4)), torch.arange(L) % 3 == 0
    dense_loss(coder, x, y, dead).backward()
    expected = [p.grad.clone() for p in coder.parameters() if p.grad is not None]
    coder.zero_grad()
    assert saefast.accelerate(coder) is coder
    out = coder(x, y, dead_mask=dead)
    loss = out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8
    assert torch.isclose(loss, dense_loss(coder, x, y, dead), rtol=1e-12)
    loss.backward()
    torch.testing.assert_close([p.grad for p in coder.parameters()], expected)


CHOICES: dict[str, Callable[[accelerate_ops.Encoder], Code | None]] = {
    "topk": lambda encoder: encoder.topk(3),
    "topk, clipped": lambda encoder: encoder.topk(11),
    "topk of dead latents": lambda encoder: encoder.topk(3, torch.tensor([1, 2, 5, 8, 9])),
    "topk of dead latents, as SAELens": lambda encoder: encoder.topk(3, torch.tensor([1, 2, 5, 8, 9]), relu=False),
    "group_max": lambda encoder: encoder.group_max(4),
    "batch_topk": lambda encoder: encoder.batch_topk(10),
    "above": lambda encoder: encoder.above(0.3),
}


@pytest.mark.parametrize("case", CHOICES)
def test_gradcheck(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is chosen and decoded; AuxK's residual is a target that has no gradient."""
    monkeypatch.setattr(accelerate_ops, "SPARSE", 1.0)
    sizes, norms = ((4, 5), (12, 5), (12,), (12, 5), (5,)), rows(30, 12).abs() + 0.5
    inputs = [rows(20 + seed, *size).requires_grad_() for seed, size in enumerate(sizes)]

    def decoded(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, Tensor]:
        code = CHOICES[case](accelerate_ops.Encoder.of(x, W_enc, b_enc, norms, mixed=True))
        assert code is not None
        return accelerate_ops.decode(code, W_dec, b_dec), accelerate_ops.dense(code, 12)

    assert torch.autograd.gradcheck(decoded, inputs)


def test_a_coder_gives_the_gradients_of_sparsify_when_asked() -> None:
    """MultiTopK and AuxK then leave the encoder alone."""
    coder, x, dead = saefast.accelerate(SparseCoder(multi_topk=True), reproduce_bugs=True), rows(3), torch.ones(L) > 0
    out = coder(x, rows(4), dead_mask=dead)
    (out.auxk_loss + out.multi_topk_fvu).backward()
    assert coder.encoder.weight.grad is None
    assert coder.W_dec.grad.count_nonzero() > 0


def test_what_a_coder_encodes_late() -> None:
    coder = saefast.accelerate(SparseCoder())
    out = coder.encode(rows().view(2, B // 2, D))
    acts, idx, pre = out
    assert torch.equal(pre, out.pre_acts)
    assert torch.equal(out[:2][1], idx)
    assert torch.equal(pre.gather(-1, idx), acts)
    assert isinstance(out, EncoderOutput)
    assert "top_acts=" in repr(out)
    late = coder.encode(rows())
    with torch.no_grad():
        coder.encoder.weight.mul_(2)
    with pytest.raises(InputError, match="pre_acts is made when it is first read, and the weights have changed"):
        tuple(late)


def test_a_matrix_is_turned_behind_its_parameter() -> None:
    ae = AutoEncoderTopK()
    plain, parameter = copy.deepcopy(ae), ae.decoder.weight
    before = {name: (p.stride(), p.clone()) for name, p in ae.named_parameters()}
    assert before["encoder.weight"][0] == (1, L)  # not as one would think
    saefast.accelerate(ae)
    assert ae.decoder.weight is parameter
    assert (parameter.stride(), ae.encoder.weight.stride()) == ((1, D), (D, 1))
    state = ae.state_dict()
    assert state["decoder.weight"].is_contiguous()
    assert ae.state_dict(keep_vars=True)["decoder.weight"] is parameter
    for x in (rows(), rows().view(4, B // 4, D)):
        torch.testing.assert_close(ae(x, output_features=True), plain(x, output_features=True))
        torch.testing.assert_close(ae.decode(ae.encode(x)), plain.decode(plain.encode(x)))
    ae(rows()).square().sum().backward()
    plain(rows()).square().sum().backward()
    for mine, theirs in zip(ae.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert mine.grad.stride() == mine.stride()
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert ae.decoder.weight in gradients._kept
    saefast.restore(ae)
    assert ae.decoder.weight not in gradients._kept
    for name, p in ae.named_parameters():
        assert p.stride() == before[name][0]
        assert torch.equal(p, before[name][1])
    assert vars(ae).keys() == vars(plain).keys()
    assert not ae._state_dict_hooks


def test_the_page_names_what_is_known() -> None:
    """Each class once, with its package, its versions and the methods that are replaced."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "accelerate.md").read_text(encoding="utf-8")
    told: dict[tuple[str, str], tuple[str, set[str]]] = {}
    base: set[str] = set()
    for line in re.findall(r"^\| (\w+) \| ([\d.*]+) \| (.*?) \| (.*?) \|$", page, re.M):
        methods = set(re.findall(r"`(\w+)`", line[3])) - {"sae", "ae"}
        methods |= base if line[3].startswith("these") else set()
        base = methods
        told |= {(line[0], name): (line[1], methods) for name in re.findall(r"`(\w+)`", line[2])}
    known = {
        (package, name): (" or ".join(v + "*" * v.endswith(".") for v in versions), set(kind.methods))
        for package, (_, versions, kinds) in accelerating_module().PACKAGES.items()
        for name, kind in kinds.items()
    }
    assert told == known


def test_a_copy_has_its_own_methods() -> None:
    ae = saefast.accelerate(AutoEncoderTopK())
    for other in (copy.deepcopy(ae), pickle.loads(pickle.dumps(ae))):
        assert other.encode.args == (other,)
        with torch.no_grad():
            other.b_dec += 1
            assert not torch.allclose(other(rows()), ae(rows()))
            torch.testing.assert_close(other(rows()), saefast.restore(other)(rows()))


def test_hooks_on_a_layer_are_called() -> None:
    ae = saefast.accelerate(AutoEncoderTopK())
    seen: list[Tensor] = []
    ae.encoder.register_forward_hook(lambda module, args, out: seen.append(out))
    ae(rows())
    assert len(seen) == 1


def test_weights_given_later_are_turned_too() -> None:
    ae, other = saefast.accelerate(AutoEncoderTopK()), AutoEncoderTopK()
    ae.load_state_dict(other.state_dict(), assign=True)
    assert ae.decoder.weight.is_contiguous()
    torch.testing.assert_close(ae(rows()), other(rows()))
    assert ae.decoder.weight.stride() == (1, D)


def test_restoring_leaves_alone_what_was_given_another_storage() -> None:
    ae, other = saefast.accelerate(AutoEncoderTopK()), AutoEncoderTopK()
    ae.load_state_dict(other.state_dict(), assign=True)
    saefast.restore(ae)
    assert [p.stride() for p in ae.parameters()] == [p.stride() for p in other.parameters()]


def test_no_rows_at_all() -> None:
    for thing in (AutoEncoderTopK(), SparseCoder()):
        x = rows(0, 0, D)
        out = saefast.accelerate(thing)(x)
        assert (out if isinstance(out, Tensor) else out.sae_out).shape == (0, D)
        found = saefast.accelerate(thing).encode(x)
        assert (found if isinstance(found, Tensor) else found.pre_acts).shape == (0, L)


def test_second_derivatives_are_refused() -> None:
    ae = saefast.accelerate(AutoEncoderTopK())
    (grad,) = torch.autograd.grad(ae(rows()).square().sum(), ae.b_dec, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = r"expected sae_lens's TopKSAE, .*; sparsify's SparseCoder; dictionary_learning's AutoEncoderTopK"
    with pytest.raises(InputError, match=rf"sae is a dictionary_learning.dictionary.GatedAutoEncoder.*{known}"):
        saefast.accelerate(GatedAutoEncoder())
    with pytest.raises(InputError, match=rf"sae is a torch.nn.modules.linear.Linear, .*{known}"):
        saefast.accelerate(nn.Linear(2, 2))

    class Mine(AutoEncoderTopK):
        def decode(self, x: Tensor) -> Tensor:
            return 2 * super().decode(x)

    with pytest.raises(InputError, match=r"Mine, which has its own decode\(\): accelerate\(\) knows .*AutoEncoderTopK"):
        saefast.accelerate(Mine())
    with pytest.raises(InputError, match=r"optimizer is a torch.optim.sgd.SGD: expected torch.optim.Adam"):
        saefast.accelerate(SparseCoder(), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    for found in ("1.4.0", "1.3.30", "unknown"):
        monkeypatch.setattr(accelerating_module(), "installed_version", lambda _, found=found: found)
        with pytest.raises(InputError, match=rf"eai-sparsify is at version {found}: accelerate\(\) knows 1.3.3"):
            saefast.accelerate(SparseCoder())
        saefast.accelerate(SparseCoder(), any_version=True)
    with pytest.raises(InputError, match="mixed is 'no': expected True or False"):
        saefast.accelerate(SparseCoder(), mixed="no")
    for thing in (nn.Linear(2, 2), "text"):
        assert saefast.restore(thing) is thing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_rows_are_those_of_spmm_t(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of one row, of a few and of all; with zeros, which are left out, and latents without an entry."""
    x, coef = rows().to(dtype), rows(1, B, K).to(dtype).relu()
    idx = torch.stack([torch.randperm(L // 2, generator=torch.Generator().manual_seed(b))[:K] for b in range(B)])
    expected = ops.spmm_t(coef, idx, x, L)
    for part in (1, 7 * D * dtype.itemsize, 1 << 21):
        monkeypatch.setattr(gradients, "PART", part)
        for ids in (idx, idx.int()):
            found = gradients.gradient_rows(coef, ids, x, torch.empty(L, D, dtype=dtype))
            torch.testing.assert_close(found, expected)
    empty = gradients.gradient_rows(coef[:0], idx[:0], x[:0], torch.empty(L, D, dtype=dtype))
    assert torch.equal(empty, torch.zeros(L, D, dtype=dtype))


def test_memory_of_gradients_is_used_again_when_nobody_holds_it() -> None:
    W = nn.Parameter(torch.zeros(L + 1, D))
    first = gradients.room_for(W, torch.float32).fill_(1)
    at = first.data_ptr()
    part = first[3:]  # a view holds it as well
    del first
    second = gradients.room_for(W.T.T, torch.float32).fill_(2)
    assert second.data_ptr() != at
    assert torch.equal(part, torch.ones_like(part))
    assert gradients.room_for(W, torch.float64).dtype == torch.float64
    held = part.numpy()
    del part
    assert gradients.room_for(W, torch.float32).data_ptr() not in (at, second.data_ptr())
    del held
    assert at % gradients.LINE == 0
    assert len(gradients._kept[W]) == gradients.KEPT
    del W, second
    gc.collect()
    assert not any(key() is not None and key().shape == (L + 1, D) for key in gradients._kept.keyrefs())


def test_gradients_that_are_kept_stay_what_they_were() -> None:
    coder = saefast.accelerate(SparseCoder())
    kept = []
    for seed in range(4):
        coder.zero_grad()
        coder(rows(seed)).fvu.backward()
        kept.append((coder.W_dec.grad, coder.W_dec.grad.clone()))
    assert all(torch.equal(*pair) for pair in kept)
    # Two batches at once add up.
    coder.zero_grad()
    for seed in range(2):
        coder(rows(seed)).fvu.backward()
    torch.testing.assert_close(coder.W_dec.grad, kept[0][1] + kept[1][1])


def test_fused_adam_steps_as_adam_does_however_things_lie() -> None:
    """Gradients and state that lie across their parameter are laid along it: fused steps would go astray."""
    weights = [rows(5, D, L), rows(6, L)]
    plain, ours = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    adams = [torch.optim.Adam(ps, lr=0.1, weight_decay=0.01) for ps in (plain, ours)]
    for number in range(4):
        for ps, adam in zip((plain, ours), adams, strict=True):
            for p, seed in zip(ps, (10, 20), strict=True):
                p.grad = rows(seed + number, *p.shape)
            adam.step()
        torch.testing.assert_close(ours, plain)
        if number == 0:
            ours[0].data = ours[0].data.T.contiguous().T
            fuse(adams[1])
            fuse(adams[1])
            accelerating_module().guard()
            assert adams[1].param_groups[0]["fused"]
        if number == 1:
            adams[1].load_state_dict(copy.deepcopy(adams[0].state_dict()))
            fuse(adams[1])
    unfuse(adams[1])
    assert not adams[1].param_groups[0]["fused"]


def test_accelerate_fuses_the_optimizer_it_is_given() -> None:
    ae = AutoEncoderTopK()
    plain = copy.deepcopy(ae)
    adams = [torch.optim.Adam(one.parameters(), lr=0.1) for one in (ae, plain)]
    for number in range(4):
        if number == 2:
            saefast.accelerate(ae, adams[0])
        for one, adam in zip((ae, plain), adams, strict=True):
            adam.zero_grad()
            one(rows(number)).square().sum().backward()
            adam.step()
    torch.testing.assert_close(list(ae.parameters()), list(plain.parameters()))
    assert adams[0].param_groups[0]["fused"]
    saefast.restore(ae, adams[0])
    assert adams[0].param_groups[0]["fused"] is None


class Output(NamedTuple):
    a: int
    late: Any


@dataclasses.dataclass
class Record:
    late: Any
    b: int = 2


def test_values_are_made_late_and_once() -> None:
    made: list[int] = []
    make = Later("late", lambda: made.append(1) or torch.ones(2))  # type: ignore[func-returns-value]
    found, record = with_late_item(Output, "late")(1, make), with_late_field(Record, "late")(make)
    assert not made
    assert isinstance(record, Record)
    assert torch.equal(found.late, record.late)
    assert len(made) == 1
    assert with_late_item(Output, "late")(1, 5)[-1] == 5
    record.late = 7
    assert record.late == 7


@pytest.mark.parametrize("to_input", [False, True])
def test_estimators_of_jumprelu_are_ramps(to_input: bool) -> None:
    """The derivative of a ramp as wide as the bandwidth; of the jump, of one as high as the threshold."""
    pre = torch.tensor([0.1, 0.9, 1.1, 1.24, 1.26, 3.0], **F64).requires_grad_()
    threshold = torch.ones(6, **F64).requires_grad_()
    near = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.0], **F64)
    on, jumped = step(pre, threshold, 0.5, to_input), jump(pre, threshold, 0.5, to_input)
    assert torch.equal(on, (pre > 1).double())
    assert torch.equal(jumped, pre * (pre > 1))
    inputs = (pre, threshold)
    grad_pre, grad_threshold = torch.autograd.grad(on.sum(), inputs, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(grad_threshold, -near / 0.5)
    torch.testing.assert_close(grad_pre, near / 0.5 * to_input)
    grad_pre, grad_threshold = torch.autograd.grad(3 * jumped.sum(), inputs)
    torch.testing.assert_close(grad_threshold, -3 * near / 0.5)
    torch.testing.assert_close(grad_pre, 3 * ((pre > 1).double() + near / 0.5 * to_input).detach())


def encoder(**options: Any) -> accelerate_ops.Encoder:
    return accelerate_ops.Encoder.of(rows(), rows(1, L, D), rows(2, L), mixed=True, **options)


@pytest.mark.parametrize("n", [0, 1, K * B, K * B + 7])
def test_the_best_of_a_batch_are_as_many_as_asked_for(n: int) -> None:
    scale = rows(8, L).abs() + 0.1
    found = encoder(scale=scale)
    rank = (found.dense() * scale).flatten()
    best = rank.topk(n).indices
    expected = torch.zeros_like(rank).index_put((best,), found.dense().flatten()[best]).view(B, L)
    torch.testing.assert_close(accelerate_ops.dense(found.batch_topk(n), L), expected)


def test_what_is_above_a_limit_is_sparse_or_left_to_dense_products(monkeypatch: pytest.MonkeyPatch) -> None:
    found, limit = encoder(), torch.linspace(2, 9, L, **F64)
    assert found.above(0.0) is None
    monkeypatch.setattr(accelerate_ops, "PROBED", 4)
    assert found.above(0.0) is None
    monkeypatch.setattr(accelerate_ops, "SPARSE", 0.9)
    code = found.above(limit)
    assert code is not None
    pre = found.dense()
    expected = torch.where(pre > limit, pre, 0)
    torch.testing.assert_close(accelerate_ops.dense(code, L), expected)
    torch.testing.assert_close(accelerate_ops.sparse(code, L).to_dense(), expected)
    monkeypatch.setattr(accelerate_ops, "SPARSE", 1.0)
    below = found.above(limit - 12, positive=False)
    assert below is not None
    assert below.pre is not None
    assert (below.acts < 0).any()
    assert int(below.pre.sum()) == int((pre > limit - 12).sum())
    assert torch.equal(below.acts * (1 - below.pre), torch.zeros_like(below.acts))


def test_prefixes_of_latents_are_decoded_one_on_the_other() -> None:
    code, W_dec, b_dec = encoder().topk(K), rows(3, L, D), rows(4, D)
    f = accelerate_ops.dense(code, L)
    for width, x_hat in zip((7, 20, L), accelerate_ops.nested(code, W_dec, b_dec, [7, 20, L]), strict=True):
        torch.testing.assert_close(x_hat, f[:, :width] @ W_dec[:width] + b_dec)


def test_dense_activations_know_their_code_as_long_as_it_is_theirs() -> None:
    code = encoder().topk(K)
    f = accelerate_ops.marked(accelerate_ops.dense(code, L), code)
    assert accelerate_ops.code_of(f) is not None
    assert accelerate_ops.code_of(f + 0) is None
    f.data[0, code.idx[0, 0]] += 1
    assert accelerate_ops.code_of(f) is None
    f = accelerate_ops.marked(accelerate_ops.dense(code, L), code)
    off = next(i for i in range(L) if i not in code.idx[3])
    f[3, off] = 1.0
    assert accelerate_ops.code_of(f) is None
    f = accelerate_ops.marked(accelerate_ops.dense(code, L).requires_grad_(), code)
    assert accelerate_ops.code_of(f) is None
    with torch.no_grad():
        assert accelerate_ops.code_of(f) is not None


def test_bf16_chooses_for_large_batches_and_writes_to_data_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the weights is made anew for each batch."""
    monkeypatch.setattr(accelerate_ops, "ROWS_FOR_MIXED", B)
    monkeypatch.setattr(accelerate_ops, "pays_off", lambda W: True)
    x, W, b = rows().float(), nn.Parameter(rows(1, L, D).float()), rows(2, L).float()

    def choose(mixed: bool) -> Code:
        with torch.no_grad():
            return accelerate_ops.Encoder.of(x, W, b, mixed=mixed).topk(K)

    for _ in range(2):
        assert accelerate_ops.Encoder.of(x, W, b, mixed=True).low is not None
        torch.testing.assert_close(choose(True).acts, choose(False).acts)
        W.data.copy_(rows(7, L, D))
    assert accelerate_ops.Encoder.of(x[1:], W, b, mixed=True).low is None
    assert accelerate_ops.Encoder.of(x, W, b, mixed=False).low is None
