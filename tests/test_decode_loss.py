"""decode_loss on its Triton kernel, against plain torch in float64, and the bits of a second run."""

import interp
import pytest
import torch
from torch import Tensor

from saefast.kernels import tuning
from saefast.optim import reference as rows
from saefast.optim import triton as rows_triton

interp.speed_up()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

SHAPES = [(1, 1, 1, 1), (5, 3, 9, 17), (3, 7, 20, 600), (4, 33, 50, 130), (2, 64, 100, 768), (2, 1100, 1200, 21)]
LARGE = [(4096, 32, 32768, 768), (1000, 64, 131072, 4096), (301, 257, 999, 1001), (64, 1024, 4096, 2304)]


def problem(B: int, K: int, L: int, D: int, kind: str, device: torch.device, W_dtype: torch.dtype = torch.float32):
    """Arguments of decode_loss: a code with distinct latents a token, its values partly 0, or of any sign for AuxK."""
    idx = torch.rand(B, L, device=device).topk(K, dim=1).indices.int()
    acts = torch.randn(B, K, device=device)
    acts = acts if kind == "aux" else acts.relu()
    x, b = torch.randn(B, D, device=device), torch.randn(D, device=device)
    W = torch.randn(L, D, device=device).to(W_dtype)
    bounds = {
        "multi": [1 + K // 3, 1 + K],
        "matryoshka": [1 + L // 3, 1 + L // 2, L + 1],
        "some unheard": [1 + K // 4, 1 + K // 2],
    }.get(kind, [K])
    weight = [0.5, 0.25, 2.0][: len(bounds)]
    options = dict(by_latent=kind == "matryoshka", relu=kind != "aux")
    return (x, acts, idx, W, None if kind == "aux" else b, weight, bounds), options


def found_by(module, args, options, dtype: torch.dtype) -> dict[str, Tensor]:
    args = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() and a is not args[3] else a for a in args]
    B, D = args[0].shape
    residual = torch.full((len(args[5]), B, D), torch.nan, dtype=dtype, device=args[0].device)
    error = torch.full_like(residual[0], torch.nan)
    if dtype == torch.float64:
        args[3] = args[3].double()
    found = module.decode_loss(*args, residual, error=error, **options)
    return dict(squares=found.squares, grad_acts=found.grad_acts, residual=residual, error=error)


def assert_close_to_plain(args, options) -> None:
    ours = found_by(rows_triton, args, options, torch.float32)
    plain = found_by(rows, args, options, torch.float32)
    exact = found_by(rows, args, options, torch.float64)
    for name, wanted in exact.items():
        allowed = 2 * (plain[name] - wanted).abs().max() + 1e-6 * wanted.abs().max()
        assert (ours[name] - wanted).abs().max() <= allowed, name
    silent = plain["grad_acts"] == 0
    assert torch.equal(ours["grad_acts"] == 0, silent)


@pytest.mark.parametrize(("B", "K", "L", "D"), SHAPES)
@pytest.mark.parametrize("kind", ["top-k", "multi", "matryoshka", "aux", "some unheard"])
def test_close_to_plain_torch(B, K, L, D, kind, device):
    assert_close_to_plain(*problem(B, K, L, D, kind, device))


def test_bfloat16_decoder(device):
    """What the lean optimiser keeps."""
    assert_close_to_plain(*problem(3, 5, 20, 48, "multi", device, torch.bfloat16))


def test_a_negative_activation_counts_but_hears_nothing_behind_relu(device):
    args, options = problem(3, 7, 20, 40, "aux", device)
    assert_close_to_plain(args, options | dict(relu=True))


def test_nothing_to_decode(device):
    args, options = problem(0, 3, 9, 17, "top-k", device)
    found = found_by(rows_triton, args, options, torch.float32)
    assert found["squares"].shape == (1, 0)
    assert found["grad_acts"].shape == (0, 3)


def test_a_code_of_zeros_leaves_x_less_its_bias(device):
    (x, acts, idx, W, b, weight, bounds), options = problem(2, 3, 9, 40, "top-k", device)
    # Rows of silent latents are not even read.
    found = found_by(rows_triton, (x, acts * 0, idx, W * torch.nan, b, weight, bounds), options, torch.float32)
    assert torch.equal(found["error"], x - b)
    assert torch.equal(found["residual"][0], 0.5 * (x - b))
    assert torch.equal(found["grad_acts"], torch.zeros_like(acts))


def test_exact_on_integers(device):
    """Sums in any order are exact: not a bit may differ, nor a column be left out or added twice."""
    B, K, L, D = 3, 9, 30, 300
    (x, _, idx, *_), options = problem(B, K, L, D, "matryoshka", device)
    x, W, b = (torch.randint(-4, 5, s, device=device).float() for s in ((B, D), (L, D), (D,)))
    acts = torch.randint(0, 3, (B, K), device=device).float()
    args = (x, acts, idx, W, b, [1.0, 2.0], [10, L])
    ours, plain = (found_by(module, args, options, torch.float32) for module in (rows_triton, rows))
    for name, wanted in plain.items():
        assert torch.equal(ours[name], wanted), name


@pytest.mark.parametrize("kind", ["top-k", "multi"])
def test_a_token_does_not_depend_on_the_others(kind, device):
    args, options = problem(5, 7, 40, 700, kind, device)
    whole = found_by(rows_triton, args, options, torch.float32)
    again = found_by(rows_triton, args, options, torch.float32)
    x, acts, idx, *rest = args
    alone = found_by(rows_triton, (x[3:4], acts[3:4], idx[3:4], *rest), options, torch.float32)
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name])
        mine = tensor[3:4] if name in ("grad_acts", "error") else tensor[:, 3:4]
        assert torch.equal(mine, alone[name])


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("D", "k"), [(1, 1), (768, 32), (4096, 64), (4096, 256), (4096, 2048), (768, 5000)])
def test_a_tile_holds_all_entries_of_a_token_in_registers(D, k, planes):
    config = tuning.decode_loss(D, k, planes)
    assert config.block_k >= k
    assert 1 <= config.block_d <= 512
    assert config.block_k * config.block_d <= 32 * 32 * config.warps // planes
    assert k > 1024 or config.block_d >= 16 // planes, "so few columns a row waste what memory gives at once"


def test_every_candidate_of_a_sweep_finds_the_same(device, monkeypatch):
    """A sweep may run any of them, any number of times, on the step's own tensors."""
    args, options = problem(3, 7, 40, 300, "multi", device)
    tried: list[tuning.DecodeLoss] = []

    def autotune(key, candidates, run):
        for config in candidates:
            run(config)
            tried.append(config)
        return tried[-1]

    monkeypatch.setattr(rows_triton, "autotunes", lambda _: True)
    monkeypatch.setattr(tuning, "autotune", autotune)
    assert_close_to_plain(args, options)
    assert len(set(tried)) >= 4


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "K", "L", "D"), LARGE)
@pytest.mark.parametrize("kind", ["top-k", "multi", "matryoshka", "aux"])
def test_large(B, K, L, D, kind, device):
    args, options = problem(B, K, L, D, kind, device)
    assert_close_to_plain(args, options)
    first, second = (found_by(rows_triton, args, options, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
