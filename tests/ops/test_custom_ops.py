"""The ops as torch's own: under torch.compile and export, with fake tensors, autocast, vmap and functorch."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import saefast
from saefast import ops
from saefast.errors import InputError
from saefast.ops.code import Code, padded

B, D, L, K = 5, 6, 24, 4


def problem(dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    tensors = torch.randn(B, D, dtype=dtype), torch.randn(L, D, dtype=dtype), torch.randn(L, dtype=dtype)
    return tuple(t.requires_grad_(requires_grad) for t in tensors)  # type: ignore[return-value]


def sparse(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """acts and idx (B, K)."""
    return torch.rand(B, K, dtype=dtype) + 0.1, torch.stack([torch.randperm(L)[:K] for _ in range(B)]).int()


def csr(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """acts, idx (n,) and row_ptr of rows with 3, 0, 7, 1 and 4 entries, and two entries that belong to none."""
    row_ptr = torch.tensor([0, 3, 3, 10, 11, 15], dtype=torch.int32)
    idx = torch.cat([torch.randperm(L)[:n] for n in (3, 7, 1, 4)] + [torch.zeros(2, dtype=torch.int64)]).int()
    return torch.cat([torch.rand(15, dtype=dtype) + 0.1, torch.zeros(2, dtype=dtype)]), idx, row_ptr


def registered(name: str) -> Any:
    """What stands behind a public op."""
    return getattr(sys.modules[f"saefast.ops.{name}"], f"_{name}")


def samples(name: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Arguments of the registered op, those that have a derivative asking for it."""
    x, W, b = problem(dtype, requires_grad=True)
    (acts, idx), (entries, latents, row_ptr) = sparse(dtype), csr(dtype)
    acts, entries = acts.requires_grad_(), entries.requires_grad_()
    scale, some = torch.rand(L, dtype=dtype) + 0.5, torch.tensor([1, 4, 5, 9, 20])
    options = ("auto", "ieee", 1 << 30)
    low = None if dtype == torch.float64 else torch.bfloat16
    return {
        "encode_topk": [
            (x, W, b, K, None, None, True, True, *options, None),
            (x, W, None, 3, some, scale, False, True, *options, low),
        ],
        "encode_batch_topk": [(x, W, b, 3, None, None, None), (x, W, None, 3, scale, None, low)],
        "encode_group_max": [(x, W, b, 6, None, True, None, None), (x, W, None, 6, scale, False, None, low)],
        "threshold_encode": [(x, W, b, None, 0.5, None), (x, W, None, scale, 0.0, low)],
        "spmm": [(acts, idx, W, None), (entries, latents, W, row_ptr)],
        "spmm_t": [(acts, idx, x, L, None), (entries, latents, x, L, row_ptr)],
        "sddmm": [(x, idx, W, None), (x, latents, W, row_ptr)],
        "sum_by_latent": [(acts, idx, L)],
        "selected": [(x, W, b, acts.detach(), idx, True)],
    }[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*ops.__all__, "selected"])
def test_opcheck_finds_nothing(name: str, dtype: torch.dtype) -> None:
    """Schema, derivative, fake kernel, and a whole compilation with dynamic shapes, forward and backward."""
    for sample in samples(name, dtype):
        opcheck(getattr(torch.ops.saefast, name).default, sample)


def test_every_public_op_is_one_of_torchs() -> None:
    for name in ops.__all__:
        assert registered(name).op == getattr(torch.ops.saefast, name).default


# --- a module of one's own


class Autoencoder(nn.Module):
    """As a user would write it; `kind` is the encoder."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.W_enc, self.W_dec = nn.Parameter(torch.randn(L, D)), nn.Parameter(torch.randn(L, D))
        self.b_enc, self.b_dec = nn.Parameter(torch.randn(L)), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - self.b_dec
        if self.kind == "topk":
            acts, idx = ops.encode_topk(centred, self.W_enc, self.b_enc, K)
            return ops.spmm(acts, idx, self.W_dec) + self.b_dec
        if self.kind == "groupmax":
            acts, idx = ops.encode_group_max(centred, self.W_enc, self.b_enc, K)
            return ops.spmm(acts, idx, self.W_dec) + self.b_dec
        if self.kind == "batchtopk":
            code = ops.encode_batch_topk(centred, self.W_enc, self.b_enc, K)
            return ops.spmm(code.acts, code.idx, self.W_dec, code.row_ptr) + self.b_dec
        row_ptr, idx, acts = ops.threshold_encode(centred, self.W_enc, self.b_enc, 0.7)
        return ops.spmm(acts, idx, self.W_dec, row_ptr) + self.b_dec


KINDS = ("topk", "groupmax", "batchtopk", "threshold")


def trained(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Loss and gradients of one step."""
    module.zero_grad()
    loss = (call(x) - x).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_whole_and_for_every_batch_size_alike(kind: str) -> None:
    module = Autoencoder(kind)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=kind == "threshold"):
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        trained(module, compiled, torch.randn(9, D))
        with torch.compiler.set_stance("fail_on_recompile"):
            for n in (5, 12, 2):
                x = torch.randn(n, D)
                for ours, plain in zip(trained(module, compiled, x), trained(module, module, x), strict=True):
                    torch.testing.assert_close(ours, plain)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_by_inductor() -> None:
    module, x = Autoencoder("topk"), torch.randn(7, D)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for ours, plain in zip(trained(module, compiled, x), trained(module, module, x), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_has_the_gradients_of_dense_autograd(kind: str) -> None:
    module, x = Autoencoder(kind), torch.randn(40, D)
    sparse_ones = trained(module, module, x)
    dense = trained(module, lambda x: dense_forward(module, x), x)
    for ours, theirs in zip(sparse_ones, dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def dense_forward(module: Autoencoder, x: Tensor) -> Tensor:
    pre = (x - module.b_dec) @ module.W_enc.T + module.b_enc
    if module.kind == "topk":
        on = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, 1) * (pre > 0)
    elif module.kind == "groupmax":
        groups = pre.view(len(x), K, -1)
        on = (groups == groups.amax(2, keepdim=True)).view_as(pre) * (pre > 0)
    elif module.kind == "batchtopk":
        on = pre >= pre.relu().flatten().topk(K * len(x)).values[-1]
    else:
        on = pre > 0.7
    return (pre * on) @ module.W_dec + module.b_dec


@pytest.mark.parametrize(
    "settings",
    [
        {"rescale_acts_by_decoder_norm": True},
        {"activation": "groupmax"},
        pytest.param({"activation": "jumprelu"}, marks=pytest.mark.slow),
    ],
)
def test_an_sae_compiles_whole_where_every_token_has_as_many_latents(settings: dict[str, Any]) -> None:
    sae = saefast.SAE(saefast.SAEConfig(D, L, K, **settings), seed=0)
    whole = settings.get("activation") != "jumprelu"
    compiled = torch.compile(sae, fullgraph=whole, dynamic=True, backend="aot_eager")
    for n in (7, 3):
        x = torch.randn(n, D)
        ours, plain = (trained(sae, lambda x, call=call: call(x).x_hat, x) for call in (compiled, sae))
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_exported_with_a_dynamic_batch(kind: str) -> None:
    module = Autoencoder(kind)
    batch = torch.export.Dim("batch", min=2, max=1000)
    program = torch.export.export(module, (torch.randn(9, D),), dynamic_shapes={"x": {0: batch}})
    x = torch.randn(4, D)
    torch.testing.assert_close(program.module()(x), module(x))


def test_a_wrong_argument_is_named_while_compiling() -> None:
    compiled = torch.compile(ops.encode_topk, fullgraph=True, backend="aot_eager")
    x, W, b = problem()
    with pytest.raises(Exception, match=r"x has shape"):
        compiled(x[:, :3], W, b, K)


def test_an_index_out_of_range_is_named_where_a_compiled_program_runs() -> None:
    acts, idx = sparse()
    wrong = idx.clone()
    wrong[1, 2] = L
    for call, second in ((ops.spmm, problem()[1]), (ops.sum_by_latent, L)):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        compiled(acts, idx, second)
        with pytest.raises(InputError, match=rf"{L}"):
            compiled(acts, wrong, second)


# --- which way a call goes


def test_a_plain_call_goes_past_the_dispatcher_and_one_that_is_looked_at_does_not() -> None:
    seen = []

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, W, b = problem(requires_grad=True)
    with Looking():
        acts, idx = ops.encode_topk(x, W, b, K)
        ops.spmm(acts, idx, W).sum().backward()
    ours = [name.removesuffix(".default") for name in seen if name.startswith("saefast")]
    assert ours[:2] == ["saefast.encode_topk", "saefast.spmm"]
    assert set(ours[2:]) == {"saefast.sddmm", "saefast.spmm_t", "saefast.spmm", "saefast.sum_by_latent"}


def test_a_plain_call_pays_for_no_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> Any:
        raise AssertionError("a plain call went to torch's dispatcher")

    for name in [*ops.__all__, "selected"]:
        monkeypatch.setattr(registered(name), "op", refused)
    x, W, b = problem(requires_grad=True)
    for kind in KINDS:
        module = Autoencoder(kind)
        trained(module, module, x)
    with pytest.raises(AssertionError, match="went to"), FakeTensorMode(allow_non_fake_inputs=True):
        ops.encode_topk(x, W, b, K)


@pytest.mark.parametrize("name", ["encode_topk", "encode_batch_topk", "encode_group_max", "spmm", "spmm_t", "sddmm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_fake_and_meta_tensors_have_the_shapes_and_dtypes_of_results(name: str, dtype: torch.dtype) -> None:
    acts, idx = sparse(dtype)
    x, W, b = problem(dtype)
    given = {"spmm": (acts, idx, W), "spmm_t": (acts, idx, x, L), "sddmm": (x, idx, W)}.get(name, (x, W, b, 6))
    call = getattr(ops, name)
    real = outputs(call(*given))
    with FakeTensorMode() as mode:
        faked = outputs(call(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in given)))
    meta = outputs(call(*(t.to("meta") if isinstance(t, Tensor) else t for t in given)))
    for one, fake, other in zip(real, faked, meta, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (fake.shape, fake.dtype, fake.stride())
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize(("threshold", "entries"), [(1e308, 0), (-1e308, B * L), (float("nan"), B * L)])
def test_a_threshold_that_fp32_has_no_number_for(threshold: float, entries: int) -> None:
    for dtype in (torch.float32, torch.float64):
        assert ops.threshold_encode(*problem(dtype), threshold)[0][-1] == entries


def outputs(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for t in found if t is not None]


# --- autocast

AUTOCAST = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("low", AUTOCAST)
@pytest.mark.parametrize("kind", ["encode_topk", "encode_group_max", "encode_batch_topk", "threshold_encode"])
def test_encoders_under_autocast_multiply_in_its_dtype_and_return_fp32(kind: str, low: torch.dtype) -> None:
    x, W, b = problem()
    argument = 0.5 if kind == "threshold_encode" else K
    call = getattr(ops, kind)
    plain = outputs(call(x.to(low), W.to(low), b, argument))
    for given in (x, x.to(low)):  # as a layer before it under autocast leaves it
        with torch.autocast("cpu", low):
            found = outputs(call(given, W, b, argument))
        assert [t.dtype for t in found] == [t.dtype for t in plain]
        assert torch.float32 in {t.dtype for t in found}
        for one, other in zip(found, plain, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("low", AUTOCAST)
def test_derivatives_under_autocast_are_of_the_weights_as_given(low: torch.dtype) -> None:
    x, W, b = problem(requires_grad=True)
    with torch.autocast("cpu", low):
        acts, idx = ops.encode_topk(x, W, b, K)
        assert (acts.dtype, acts.requires_grad) == (torch.float32, True)
        x_hat = ops.spmm(acts, idx, W)
    assert x_hat.dtype == torch.float32
    found = torch.autograd.grad(acts.square().sum(), (x, W, b))
    assert [g.dtype for g in found] == [torch.float32] * 3
    grad = (2 * acts * (acts > 0)).detach()
    torch.testing.assert_close(found[0], ops.spmm(grad, idx, W.detach()))
    torch.testing.assert_close(found[1], ops.spmm_t(grad, idx, x.detach(), L))
    torch.testing.assert_close(found[2], ops.sum_by_latent(grad, idx, L))


def test_sparse_products_are_the_same_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does them: plain torch's sums too."""
    (acts, idx), (x, W, _) = sparse(), problem()
    calls = [
        lambda: ops.spmm(acts, idx, W), lambda: ops.sddmm(x, idx, W), lambda: ops.spmm_t(acts, idx, x, L),
        lambda: ops.sum_by_latent(acts, idx, L), lambda: ops.encode_topk(x.double(), W.double(), None, K)[0],
    ]  # fmt: skip
    for backend in ("native", "reference"):
        if backend == "reference":
            monkeypatch.setattr("saefast.extension.available", lambda: False)
        for call in calls:
            plain = call()
            with torch.autocast("cpu", torch.bfloat16):
                found = call()
            assert found.dtype == plain.dtype
            assert torch.equal(found, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_under_autocast_as_without_compiling(kind: str) -> None:
    module, x = Autoencoder(kind), torch.randn(6, D)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
        for ours, plain in zip(trained(module, compiled, x), trained(module, call, x), strict=True):
            torch.testing.assert_close(ours, plain)


def test_without_autocast_two_dtypes_are_refused_and_float64_is_left_alone() -> None:
    x, W, b = problem()
    with pytest.raises(InputError, match="expected one floating dtype for both"):
        ops.encode_topk(x.bfloat16(), W, b, K)
    with torch.autocast("cpu", torch.bfloat16):
        acts, _ = ops.encode_topk(x.double(), W.double(), b, K)
        assert acts.dtype == torch.float64
        with pytest.raises(InputError, match="expected one floating dtype for both"):
            ops.encode_topk(x, W.double(), b, K)


# --- functorch


@pytest.mark.parametrize("in_dim", [0, 1])
def test_vmap_over_rows_is_a_larger_batch(in_dim: int) -> None:
    x, W, b = torch.randn(3, B, D), *problem()[1:]
    given = x if in_dim == 0 else x.movedim(0, 1)
    acts, idx = torch.vmap(lambda x: ops.encode_topk(x, W, b, K), in_dims=in_dim)(given)
    for n in range(3):
        for one, other in zip((acts[n], idx[n]), ops.encode_topk(x[n], W, b, K), strict=True):
            assert torch.equal(one, other)
    x_hat = torch.vmap(lambda acts, idx: ops.spmm(acts, idx, W))(acts, idx)
    assert torch.equal(x_hat, torch.stack([ops.spmm(acts[n], idx[n], W) for n in range(3)]))
    dots = torch.vmap(lambda x: ops.sddmm(x, idx[0], W))(x)
    assert torch.equal(dots, torch.stack([ops.sddmm(x[n], idx[0], W) for n in range(3)]))
    assert torch.vmap(lambda x: ops.encode_group_max(x, W, b, K)[0])(x[:, :0]).shape == (3, 0, K)


CODE = csr()


def mapped(call: Callable[[Tensor], Any], given: Tensor) -> Any:
    return torch.vmap(call)(torch.stack([given, given]))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda x, W, b: mapped(lambda W: ops.encode_topk(x, W, b, K), W),
            "W_enc of saefast.ops.encode_topk",
        ),
        (lambda x, W, b: mapped(lambda x: ops.encode_batch_topk(x, W, b, K), x), "none can be"),
        (lambda x, W, b: mapped(lambda x: ops.threshold_encode(x, W, b, 0.5), x), "none can be"),
        (lambda x, W, b: mapped(lambda acts: ops.spmm(acts, CODE[1], W, CODE[2]), CODE[0]), "acts of saefast.ops.spmm"),
    ],
)
def test_vmap_over_anything_else_is_refused_in_a_sentence(call: Callable[..., Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        call(*problem())
    assert said in str(error.value)
    assert "call the op once for each, in a loop" in str(error.value)


def test_functional_gradients_are_autograds() -> None:
    module, x = Autoencoder("topk"), torch.randn(7, D)
    own = {name: p.detach() for name, p in module.named_parameters()}

    def loss(own: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.func.functional_call(module, own, (x,)) - x).square().mean()

    for one, other in zip(torch.func.grad(loss)(own, x).values(), trained(module, module, x)[1:], strict=True):
        torch.testing.assert_close(one, other)
    mapped = torch.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, 0))(own, x[:, None])
    alone = [torch.func.grad(loss, argnums=1)(own, x[n : n + 1]) for n in range(7)]
    torch.testing.assert_close(mapped, torch.stack(alone))
    with pytest.raises(InputError, match=r"saefast\.ops\.spmm_t is mapped over"):
        torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(own, x[:, None])


def test_forward_mode_is_refused_rather_than_left_out() -> None:
    x, W, b = problem()
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda x: ops.encode_topk(x, W, b, K)[0], (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        ops.encode_topk(torch.autograd.forward_ad.make_dual(x, x), W, b, K)


# --- derivatives beyond tests/ops/test_derivatives.py


def twice(call: Callable[..., Tensor], given: tuple[Tensor, ...]) -> bool:
    """In one random direction: of all of them there are too many."""
    return gradgradcheck(call, given, fast_mode=True)


def test_first_and_second_derivatives_of_sparse_products() -> None:
    (acts, idx), (x, W, _) = sparse(torch.float64), problem(torch.float64, requires_grad=True)
    acts.requires_grad_()
    entries, latents, row_ptr = csr(torch.float64)
    entries.requires_grad_()
    for check in (gradcheck, twice):
        assert check(lambda acts, W: ops.spmm(acts, idx, W), (acts, W))
        assert check(lambda x, W: ops.sddmm(x, idx, W), (x, W))
        assert check(lambda acts, x: ops.spmm_t(acts, idx, x, L), (acts, x))
        assert check(lambda acts: ops.sum_by_latent(acts, idx, L), (acts,))
        assert check(lambda acts, W: ops.spmm(acts, latents, W, row_ptr), (entries, W))
        assert check(lambda x, W: ops.sddmm(x, latents, W, row_ptr), (x, W))
        assert check(lambda acts, x: ops.spmm_t(acts, latents, x, L, row_ptr), (entries, x))


@pytest.mark.parametrize("clip", [True, False])
def test_second_derivatives_of_a_code(clip: bool) -> None:
    args = problem(torch.float64, requires_grad=True)
    assert twice(lambda *a: ops.encode_topk(*a, K, relu=clip)[0], args)
    assert gradcheck(lambda *a: ops.threshold_encode(*a, 0.5 * clip)[2], args)
    assert twice(lambda *a: ops.threshold_encode(*a, 0.5 * clip)[2], args)
    assert twice(lambda *a: ops.encode_batch_topk(*a, K)[0], args)


# --- CSR codes


def test_csr_products_are_those_of_padded_rows() -> None:
    entries, latents, row_ptr = csr()
    x, W, _ = problem()
    rows = padded(Code(entries, latents, row_ptr), L)
    assert torch.equal(ops.spmm(entries, latents, W, row_ptr), ops.spmm(rows.acts, rows.idx, W))
    torch.testing.assert_close(ops.spmm_t(entries, latents, x, L, row_ptr), ops.spmm_t(rows.acts, rows.idx, x, L))
    dots = ops.sddmm(x, latents, W, row_ptr)
    tokens = Code(entries, latents, row_ptr).tokens()[:15]
    torch.testing.assert_close(dots[:15], (x[tokens] * W[latents[:15].long()]).sum(1))
    assert torch.equal(dots[15:], torch.zeros(2))
    assert torch.equal(ops.sum_by_latent(entries, latents, L), ops.sum_by_latent(entries[None], latents[None], L))
    nothing = torch.zeros(1, dtype=torch.int64)
    assert ops.spmm(entries[:0], latents[:0], W, nothing).shape == (0, D)


@pytest.mark.parametrize(
    ("row_ptr", "said"),
    [
        (torch.tensor([0, 3, 2, 10, 11, 15]), "row_ptr goes from 0 to 15: expected to ascend from 0"),
        (torch.tensor([1, 3, 3, 10, 11, 15]), "row_ptr goes from 1 to 15"),
        (torch.tensor([0, 3, 3, 10, 11, 18]), "to no more than the 17 entries"),
        (torch.tensor([0.0, 3.0, 3.0, 10.0, 11.0, 15.0]), r"expected \(batch \+ 1,\) int32 or int64"),
        (torch.tensor([], dtype=torch.int32), r"expected \(batch \+ 1,\)"),
        (torch.tensor([0, 3, 15]), "rows and x 5|a row for each"),
        (None, r"expected int32 or int64, \(batch, k\)"),
    ],
)
def test_a_row_ptr_that_is_none_is_named(row_ptr: Tensor | None, said: str) -> None:
    entries, latents, _ = csr()
    x, W, _ = problem()
    with pytest.raises(InputError, match=said):
        ops.sddmm(x, latents, W, row_ptr)
    with pytest.raises(InputError, match=said):
        ops.spmm_t(entries, latents, x, L, row_ptr)
