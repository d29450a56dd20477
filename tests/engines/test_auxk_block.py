"""AuxK as a dense block: the gradients of autograd, the steps of the sparse code, and bounded memory."""

import itertools
from typing import Any

import pytest
import torch
from allocations import Allocations
from classic import CLASSIC
from torch import Tensor

from saefast.devices import DEVICES
from saefast.engines import auxk_block
from saefast.engines.base import PARAMETERS
from saefast.engines.config import preset
from saefast.engines.fused import FusedEngine
from saefast.engines.gradient import Gradient
from saefast.models.sae import SAE
from saefast.ops.reference import stable_topk
from saefast.optim.reference import gradient_rows

D, L, K, B = 24, 128, 6, 200


def problem(n: int, *, code: bool, norms: bool, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """Arguments of auxk_block on small integers, on which every sum is exact and many values tie."""

    def integers(*shape: int, low: int = -2, high: int = 3) -> Tensor:
        return torch.randint(low, high, shape).to(dtype)

    x, error, plane = integers(B, D), integers(B, D), torch.full((B, D), torch.nan, dtype=dtype)
    scale = torch.tensor(2.0, dtype=dtype) ** integers(L) if norms else None
    encoder = auxk_block.Encoder(integers(L, D), integers(L), integers(L, D), scale)
    ids = torch.randperm(L)[:n].sort().values
    idx = torch.rand(B, L).topk(K, dim=1).indices.int()
    own = auxk_block.Code(integers(B, K, low=0), idx, integers(B, K), integers(B, D)) if code else None
    return (x, error, plane, encoder, ids), own


def by_autograd(arguments: tuple[Any, ...], own: auxk_block.Code | None, k: int, weight: float, relu: bool) -> Any:
    """The same by the definition: one loss, differentiated, and the code's entries one at a time."""
    x, error, _, encoder, ids = arguments
    W_enc, b_enc, W_dec = (t.clone().requires_grad_() for t in encoder[:3])
    pre = x @ W_enc[ids].T + b_enc[ids]
    rank = pre if encoder.norms is None else pre * encoder.norms[ids]
    chosen = torch.zeros_like(pre).scatter_(1, torch.sort(rank, dim=1, descending=True, stable=True).indices[:, :k], 1)
    acts = (pre.relu() if relu else pre) * chosen
    left = error - acts @ W_dec[ids]
    squares = left.square().sum(1)
    (weight * squares.sum()).backward()
    grads = [W_dec.grad, W_enc.grad, b_enc.grad]
    if own is not None:
        for b, j in itertools.product(range(len(x)), range(own.idx.shape[1])):
            latent = int(own.idx[b, j])
            if latent in ids:
                grads[0][latent] += -2 * own.acts[b, j] * own.plane[b]
                grads[1][latent] += own.grad[b, j] * x[b]
                grads[2][latent] += own.grad[b, j]
    return *(g[ids] for g in grads), squares.detach(), weight * left.detach()


@pytest.mark.parametrize("budget", [1 << 30, 1 << 16, 1 << 12])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (40, 40), (40, 7), (100, 1)])
def test_gradients_are_those_of_autograd(n, k, relu, budget, monkeypatch):
    """However it is cut: to the bit, ties included, since all sums are exact."""
    monkeypatch.setattr(auxk_block, "BUDGET", budget)
    for code, norms in ((False, False), (True, True)):
        arguments, own = problem(n, code=code, norms=norms)
        expected = by_autograd(arguments, own, k, 0.5, relu)
        found = auxk_block.auxk_block(*arguments, k, 0.5, relu=relu, code=own)
        got = found.for_dec, found.for_enc, found.b_enc, found.squares, arguments[2]
        for name, a, b in zip(("for_dec", "for_enc", "b_enc", "squares", "plane"), got, expected, strict=True):
            assert torch.equal(a, b), name
        if own is not None:
            assert torch.equal(found.taken, torch.isin(own.idx, arguments[4]))


def test_a_nan_comes_through():
    arguments, own = problem(20, code=False, norms=False)
    arguments[0][3, 2] = torch.nan
    found = auxk_block.auxk_block(*arguments, 5, 1.0, relu=True, code=own)
    assert found.squares.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(("D", "k", "n"), [(4096, 2048, 32768), (768, 384, 6144), (8192, 4096, 16384)])
def test_memory_is_bounded_and_nothing_is_read_back(D, k, n):
    """At real sizes, on tensors without memory, which no number can be read of."""
    L = 131_072

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    x, error, plane, own_plane, acts = empty(8192, D), empty(8192, D), empty(8192, D), empty(8192, D), empty(8192, 64)
    encoder = auxk_block.Encoder(empty(L, D), empty(L), empty(L, D), empty(L))
    ids, idx = (torch.empty(s, dtype=d, device="meta") for s, d in (((n,), torch.int64), ((8192, 64), torch.int32)))
    code = auxk_block.Code(acts, idx, acts, own_plane)
    given = [x, error, plane, own_plane, acts, encoder.W_enc, encoder.b_enc, encoder.W_dec, encoder.norms, ids, idx]
    with Allocations(*given) as watch:
        auxk_block.auxk_block(x, error, plane, encoder, ids, k, 1.0, relu=True, code=code)
    rows = 2 * n * D * 4
    assert rows <= auxk_block.BUDGET
    assert rows < watch.peak <= rows + auxk_block.BUDGET
    assert watch.peak < 8192 * n * 8 + rows or n < 10_000, "as much as B times the dead latents"


def test_a_gpu_takes_the_block_up_to_where_costs_meet():
    h200 = DEVICES["h200"]
    n_over_k = auxk_block.break_even(h200.flops_fp32, h200.bandwidth)
    assert n_over_k == pytest.approx(18.6, rel=0.01)
    B, k, D = 8192, 2048, 4096
    gathers, products = B * k * 4 * (4 * D) / h200.bandwidth, 5 * 2 * B * (n_over_k * k) * D / h200.flops_fp32
    assert gathers == pytest.approx(products)
    assert not auxk_block.pays_off(torch.zeros(2, 3), 3, 3), "never on a CPU"

    class OnGpu:
        is_cuda, device, shape = True, "some GPU", (8192, 4096)

        def element_size(self) -> int:
            return 4

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auxk_block, "most", lambda device: {"some GPU": 18.6}[device])
        for n, expected in ((1, True), (2048, True), (32768, True), (32769, False), (131_072, False)):
            assert auxk_block.pays_off(OnGpu(), 2048, n) == expected, "rows for 32768 latents are 1 GiB"
        assert auxk_block.pays_off(OnGpu(), 100, 1860)
        assert not auxk_block.pays_off(OnGpu(), 100, 1861)


def batches(n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    sources = torch.randn(60, D)
    code = torch.rand(n, B, 60) * (torch.rand(n, B, 60) < 0.1)
    return list((code @ sources + 0.05 * torch.randn(n, B, D)).to(dtype))


def engine(
    data: list[Tensor], name: str = "saefast", hot_share: float | None = None, settle_every: int = 3, **settings: Any
) -> FusedEngine:
    dtype = str(data[0].dtype).removeprefix("torch.")
    ours = CLASSIC if name == "saefast" else {}
    settings = ours | dict(lr=1e-3, dead_after=2 * B, dtype=dtype, engine="fused") | settings
    sae_config, config = preset(name, D, L, K, **settings)
    found = FusedEngine(SAE(sae_config, seed=1), config, 60, settle_every=settle_every, hot_share=hot_share)
    found.initialise(data[0])
    with torch.no_grad():
        # A third of the latents is too low to be chosen and too high to be silent: AuxK has work to do.
        found.sae.b_enc[::3] -= 1.0
    return found


SETTINGS: dict[str, dict[str, Any]] = {
    "ours": {},
    "few a token": dict(auxk_k=5),
    "more than are dead": dict(auxk_k=100, auxk_scale_few_dead=True),
    "of any sign": dict(auxk_relu=False, auxk_k=9),
    "counted before the batch": dict(dead_update_first=False, dead_after=1, dead_unit="steps", auxk_k=40),
    "weak ones do not count": dict(fired_above=1.5, dead_after=B, auxk_k=30),
    "moves b_dec": dict(auxk_b_dec_grad=True, auxk_denominator="inputs"),
    "ranked by norms": dict(rescale_acts_by_decoder_norm=True, decoder_norm="never", project_decoder_grad=False),
    "clipped": dict(max_grad_norm=0.01),
    "not centred": dict(apply_b_dec_to_input=False),
    "hot latents too": dict(hot_share=0.02),
    "all losses, so no block": dict(multi_topk_coef=0.5),
}


def whole(g: Gradient) -> dict[str, Tensor]:
    """A gradient as dense matrices, wherever its rows are."""
    found = {"b_enc": g.b_enc, "b_dec": g.b_dec}
    for name, runs in (("for_dec", g.for_dec), ("for_enc", g.for_enc)):
        found[name] = torch.zeros(L, D, dtype=torch.float64)
        found[name][g.groups.latents.long()] = gradient_rows(runs)
        for block in g.blocks:
            assert not torch.isin(block.ids, g.groups.latents).any(), "a latent has its gradient from one place"
            found[name][block.ids.long()] = getattr(block, name)
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_is_that_of_the_sparse_code(name, monkeypatch):
    data, settings = batches(12), SETTINGS[name]
    taken = 0
    made = auxk_block.auxk_block

    def watched(*args: Any, **options: Any) -> auxk_block.Block:
        nonlocal taken
        found = made(*args, **options)
        taken += 0 if found.taken is None else int(found.taken.sum())
        return found

    ours = engine(data, **settings)
    monkeypatch.setattr(auxk_block, "auxk_block", watched)
    blocks = 0
    for i, x in enumerate(data):
        ours.weights.bind()
        # Both passes settle rows, and so their norms: here they find them all settled.
        ours.weights.settle_decoder(torch.arange(L, dtype=torch.int32))
        monkeypatch.setattr(auxk_block, "pays_off", lambda *_: False)
        sparse = ours._gradient(x, x)
        expected = whole(sparse)
        monkeypatch.setattr(auxk_block, "pays_off", lambda *_: True)
        block = ours._gradient(x, x)
        blocks += len(block.blocks) > len(sparse.blocks)
        assert (block.loss, block.fvu, block.auxk) == pytest.approx((sparse.loss, sparse.fvu, sparse.auxk), rel=1e-10)
        for key, found in whole(block).items():
            assert (found - expected[key]).abs().max() <= 1e-10 * expected[key].abs().max(), (i, key)
        # Steps by either way, so that both start from what the other has left.
        monkeypatch.setattr(auxk_block, "pays_off", lambda *_, i=i: i % 2 == 0)
        ours.step(x)
    assert (blocks >= 6) == (name != "all losses, so no block")
    assert (taken > 0) == (name in ("counted before the batch", "weak ones do not count"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_training_ends_where_the_sparse_code_ends(dtype, monkeypatch):
    """All dead latents take part, of either sign: then no row is left alone in one form and updated in the other."""
    data = batches(25, dtype)
    block, plain, again = (engine(data, auxk_relu=False, auxk_k=L) for _ in range(3))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    for x in data:
        monkeypatch.setattr(auxk_block, "pays_off", lambda *_: True)
        a, c = block.step(x), again.step(x)
        monkeypatch.setattr(auxk_block, "pays_off", lambda *_: False)
        b = plain.step(x)
        assert a == c, "not repeatable"
        assert (a.loss, float(a.auxk_loss)) == pytest.approx((b.loss, float(b.auxk_loss)), rel=tolerance)
    for name in PARAMETERS:
        found, again_found, expected = (getattr(e.sae, name).detach() for e in (block, again, plain))
        assert (found - expected).abs().max() <= 10 * tolerance * expected.abs().max(), name
        assert torch.equal(found, again_found)


def test_a_lean_run_has_blocks_too(monkeypatch):
    data = batches(25, torch.float32)
    block, plain = (engine(data, optimizer="adam-lean") for _ in range(2))
    calls = []
    made = auxk_block.auxk_block
    monkeypatch.setattr(auxk_block, "auxk_block", lambda *a, **o: (calls.append(1), made(*a, **o))[1])
    for x in data:
        monkeypatch.setattr(auxk_block, "pays_off", lambda *_: True)
        a = block.step(x)
        monkeypatch.setattr(auxk_block, "pays_off", lambda *_: False)
        b = plain.step(x)
    assert len(calls) > 10
    assert a.loss == pytest.approx(b.loss, rel=0.02)


def test_every_row_in_every_update_leaves_no_room_for_blocks(monkeypatch):
    data = batches(6)
    ours = engine(data, settle_every=1)
    monkeypatch.setattr(auxk_block, "pays_off", lambda *_: True)
    monkeypatch.setattr(auxk_block, "auxk_block", lambda *_, **__: pytest.fail("rows would be updated twice"))
    for x in data:
        ours.step(x)
    assert float(ours.step(data[0]).auxk_loss) > 0


def test_stable_topk_gives_ties_to_the_lower_latent():
    """What the block selects by, on a row of equal values."""
    assert stable_topk(torch.ones(1, 9), 4).sort().values.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stable_topk_gives_ties_to_the_lower_id(dtype: torch.dtype) -> None:
    values = torch.randint(0, 3, (20, 12)).to(dtype)
    ids = torch.stack([torch.randperm(1000)[:12] for _ in range(20)]).int()
    found = stable_topk(values, 5, ids)
    for row, (value, id_) in enumerate(zip(values.tolist(), ids.tolist(), strict=True)):
        assert found[row].tolist() == sorted(range(12), key=lambda c: (-value[c], id_[c]))[:5]
