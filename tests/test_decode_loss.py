"""decode_loss on its Triton kernel, against plain torch in float64, and the bits of a second run."""

import interp
import pytest
import torch
from torch import Tensor

from saefast.kernels import tuning
from saefast.ops.code import Code, Prefixes
from saefast.optim import reference as rows
from saefast.optim import triton as rows_triton

interp.speed_up()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

SHAPES = [(1, 1, 1, 1), (5, 3, 9, 17), (3, 7, 20, 600), (4, 33, 50, 130), (2, 64, 100, 768), (2, 1100, 1200, 21)]
KINDS = ["top-k", "multi", "matryoshka", "aux", "csr top-k", "csr multi", "csr matryoshka", "csr aux"]
LARGE = [(4096, 32, 32768, 768), (1000, 64, 131072, 4096), (301, 257, 999, 1001), (64, 1024, 4096, 2304)]


def problem(B: int, K: int, L: int, D: int, kind: str, device: torch.device, W_dtype: torch.dtype = torch.float32):
    """Arguments of decode_loss: a code with distinct latents a token, its values partly 0, or of any sign for AuxK.

    "csr ..." has the code of the kind with as many entries in a row as fall to it, none in some, and padding.
    """
    csr, kind = kind.startswith("csr "), kind.removeprefix("csr ")
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
    prefixes = Prefixes(bounds, [0.5, 0.25, 2.0][: len(bounds)], kind == "matryoshka", main=len(bounds) // 2)
    code = ragged(acts, idx) if csr else Code(acts, idx)
    return (x, code, W, None if kind == "aux" else b, prefixes), dict(relu=kind != "aux")


def ragged(acts: Tensor, idx: Tensor, padding: int = 3) -> Code:
    """The first so many entries of every row, none of row 0 and all of row 1."""
    counts = torch.randint(0, idx.shape[1] + 1, (len(idx),), device=idx.device)
    counts[:1], counts[1:2] = 0, idx.shape[1]
    row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    there = torch.arange(idx.shape[1], device=idx.device) < counts[:, None]
    room = padding if len(idx) else 0
    return Code(*(torch.cat([t[there], t.new_zeros(room)]) for t in (acts, idx)), row_ptr)


def found_by(module, args, options, dtype: torch.dtype) -> dict[str, Tensor]:
    x, code, W, b, prefixes = args
    (B, D), P = x.shape, len(prefixes.bounds)
    residual = torch.full((P, B, D), torch.nan, dtype=dtype, device=x.device)
    error = torch.full((B, D), torch.nan, dtype=dtype, device=x.device)
    W = W.double() if dtype == torch.float64 else W
    code = code._replace(acts=code.acts.to(dtype))
    b = None if b is None else b.to(dtype)
    found = module.decode_loss(x.to(dtype), code, W, b, prefixes, residual, error=error, **options)
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
@pytest.mark.parametrize("kind", [*KINDS, "some unheard", "csr some unheard"])
def test_close_to_plain_torch(B, K, L, D, kind, device):
    assert_close_to_plain(*problem(B, K, L, D, kind, device))


@pytest.mark.parametrize("kind", ["multi", "csr multi"])
def test_bfloat16_decoder(kind, device):
    """What the lean optimiser keeps."""
    assert_close_to_plain(*problem(3, 5, 20, 48, kind, device, torch.bfloat16))


@pytest.mark.parametrize("kind", ["aux", "csr aux"])
def test_a_negative_activation_counts_but_has_no_gradient_behind_relu(kind, device):
    args, options = problem(3, 7, 20, 40, kind, device)
    assert_close_to_plain(args, options | dict(relu=True))


@pytest.mark.parametrize("kind", ["top-k", "csr top-k"])
def test_nothing_to_decode(kind, device):
    args, options = problem(0, 3, 9, 17, kind, device)
    found = found_by(rows_triton, args, options, torch.float32)
    assert found["squares"].shape == (1, 0)
    assert found["grad_acts"].shape == args[1].acts.shape


@pytest.mark.parametrize("kind", ["top-k", "csr top-k"])
def test_a_code_of_zeros_leaves_x_less_its_bias(kind, device):
    (x, code, W, b, prefixes), options = problem(2, 3, 9, 40, kind, device)
    # Rows of latents that are off are not even read.
    args = (x, code._replace(acts=code.acts * 0), W * torch.nan, b, prefixes)
    found = found_by(rows_triton, args, options, torch.float32)
    assert torch.equal(found["error"], x - b)
    assert torch.equal(found["residual"][0], 0.5 * (x - b))
    assert torch.equal(found["grad_acts"], torch.zeros_like(code.acts))


@pytest.mark.parametrize("kind", ["matryoshka", "csr matryoshka"])
def test_exact_on_integers(kind, device):
    """Sums in any order are exact: not a bit may differ, nor a column be left out or added twice."""
    B, K, L, D = 3, 70, 130, 300
    (x, code, W, b, prefixes), options = problem(B, K, L, D, kind, device)
    x, W, b = (torch.randint(-4, 5, t.shape, device=device).float() for t in (x, W, b))
    code = code._replace(acts=(code.acts > 0.3).float() * torch.randint(0, 3, code.acts.shape, device=device))
    args = (x, code, W, b, prefixes._replace(weight=[1.0, 2.0, 4.0]))
    ours, plain = (found_by(module, args, options, torch.float32) for module in (rows_triton, rows))
    for name, wanted in plain.items():
        assert torch.equal(ours[name], wanted), name


@pytest.mark.parametrize("kind", ["top-k", "multi"])
def test_a_token_does_not_depend_on_the_others(kind, device):
    args, options = problem(5, 7, 40, 700, kind, device)
    whole = found_by(rows_triton, args, options, torch.float32)
    again = found_by(rows_triton, args, options, torch.float32)
    x, code, *rest = args
    alone = found_by(rows_triton, (x[3:4], Code(code.acts[3:4], code.idx[3:4]), *rest), options, torch.float32)
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name])
        mine = tensor[3:4] if name in ("grad_acts", "error") else tensor[:, 3:4]
        assert torch.equal(mine, alone[name])


def test_a_row_of_a_csr_code_does_not_depend_on_the_others(device):
    args, options = problem(5, 37, 60, 700, "csr multi", device)
    whole, again = (found_by(rows_triton, args, options, torch.float32) for _ in range(2))
    x, code, *rest = args
    begin, end = code.row_ptr[3:5].tolist()
    assert end > begin
    mine = Code(code.acts[begin:end], code.idx[begin:end], torch.tensor([0, end - begin], dtype=torch.int32).to(device))
    alone = found_by(rows_triton, (x[3:4], mine, *rest), options, torch.float32)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert torch.equal(whole["grad_acts"][begin:end], alone["grad_acts"])
    assert torch.equal(whole["error"][3:4], alone["error"])
    assert torch.equal(whole["residual"][:, 3:4], alone["residual"])
    assert torch.equal(whole["squares"][:, 3:4], alone["squares"])


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("D", "k"), [(1, 1), (768, 32), (4096, 64), (4096, 256), (4096, 2048), (768, 5000)])
def test_a_tile_holds_all_entries_of_a_token_in_registers(D, k, planes):
    config = tuning.decode_loss(D, k, planes)
    assert config.block_k >= k
    assert 1 <= config.block_d <= 512
    assert config.block_k * config.block_d <= 32 * 32 * config.warps // planes
    assert k > 1024 or config.block_d >= 16 // planes, "so few columns a row waste what memory gives at once"


@pytest.mark.parametrize("kind", ["multi", "csr multi"])
def test_every_candidate_of_autotuning_finds_the_same(kind, device, monkeypatch):
    """It may run any of them, any number of times, on the step's own tensors."""
    args, options = problem(3, 7, 40, 300, kind, device)
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
@pytest.mark.parametrize("kind", KINDS)
def test_large(B, K, L, D, kind, device):
    args, options = problem(B, K, L, D, kind, device)
    assert_close_to_plain(args, options)
    first, second = (found_by(rows_triton, args, options, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
