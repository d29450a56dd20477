"""threshold_encode on Triton kernels: exact counts and places, in every form of the tile kernel."""

import math

import interp
import pytest
import torch
from draws import given, settings, st

from saefast.errors import InputError
from saefast.kernels import tuning
from saefast.ops import reference
from saefast.ops import triton_threshold_encode as driver
from saefast.ops.triton_encode_tiles import make_encoder

interp.speed_up()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def integers(*shape, low=-3, high=4, dtype=torch.float16):
    return torch.randint(low, high, shape).to(dtype)


def assert_same_csr(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0, equal_nan=True)


def both(x, W, b, threshold, **options):
    """The kernels' result and the reference's, of integers and so to the bit."""
    on = [None if t is None else t.to(DEVICE) for t in (x, W, b)]
    moved = threshold.to(DEVICE) if isinstance(threshold, torch.Tensor) else threshold
    return driver.threshold_encode(*on, moved, **options), reference.threshold_encode(x, W, b, threshold)


@pytest.mark.parametrize("method", ["fused", "chunked"])
@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("each", [False, True], ids=["one threshold", "one a latent"])
def test_is_the_dense_comparison(each, chunk, method):
    x, W, b = integers(3, 24), integers(333, 24), integers(333)
    threshold = integers(333, low=0, high=9, dtype=torch.float32) if each else 4.0
    found, expected = both(x, W, b, threshold, chunk=chunk, method=method)
    assert_same_csr(found, expected)
    assert 0 < len(found[1]) < 3 * 333


def test_descriptors_count_alike(monkeypatch):
    arch = tuning.architecture(torch.cuda.get_device_capability() if DEVICE == "cuda" else None)
    if 0 < arch < 90:
        pytest.skip("no TMA on this device")
    config = tuning.Tiles(16, 64, 32, 4, 1, 1) if arch == 0 else tuning.LEAN_TILES["half"]
    monkeypatch.setattr(tuning, "TILES", tuning.TILES | {(arch, "half"): (config, config)})
    monkeypatch.setattr(tuning, "LEAN_TILES", {"half": config})
    x, W, b = integers(3, 24), integers(333, 24), integers(333)
    assert_same_csr(*both(x, W, b, integers(333, low=0, high=9, dtype=torch.float32), chunk=128))


@pytest.mark.parametrize("threshold", [-1e9, 1e9, math.inf, math.nan])
def test_all_none_and_thresholds_that_are_no_numbers(threshold):
    x, W = integers(2, 5), integers(70, 5)
    found, expected = both(x, W, None, threshold)
    assert_same_csr(found, expected)
    assert len(found[1]) == (0 if threshold > 0 else 140)


def test_nan_and_infinities_count_as_the_reference_says():
    x, W, b = integers(3, 8), integers(100, 8), integers(100)
    b[[3, 99]], b[[7, 50]], b[20] = math.nan, math.inf, -math.inf
    x[1, 0] = math.nan
    threshold = integers(100, low=0, high=9, dtype=torch.float32)
    threshold[7], threshold[20] = math.inf, -math.inf
    assert_same_csr(*both(x, W, b, threshold, chunk=32))


@pytest.mark.parametrize("B", [0, 1, 21])
def test_a_scratch_cap_splits_rows_and_changes_nothing(B):
    x, W, b = integers(B, 16), integers(150, 16), integers(150)
    found, expected = both(x, W, b, 3.0, max_scratch_bytes=12_000)
    assert_same_csr(found, expected)
    cut = driver._cut_csr(make_encoder(x, W, b, None, None, "fused", "ieee"), x, None, 12_000)
    assert B < 2 or cut.rows < B
    with pytest.raises(InputError, match="max_scratch_bytes is 100: expected at least"):
        both(x, W, b, 3.0, max_scratch_bytes=100)


@given(
    B=st.integers(0, 4), D=st.integers(1, 40), L=st.integers(1, 150), chunk=st.integers(1, 150),
    threshold=st.integers(-3, 6), method=st.sampled_from(["fused", "chunked"]), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_any_shape(B, D, L, chunk, threshold, method, seed):
    torch.manual_seed(seed)
    x, W, b = integers(B, D), integers(L, D), integers(L)
    assert_same_csr(*both(x, W, b, float(threshold), chunk=chunk, method=method))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["fused", "chunked"])
def test_gpu_large_and_repeatable(method):
    x, W = integers(500, 768, dtype=torch.bfloat16), integers(50_001, 768, dtype=torch.bfloat16)
    b, threshold = integers(50_001).float(), integers(50_001, low=150, high=220, dtype=torch.float32)
    found, _ = both(x, W, b, threshold, method=method)
    again, expected = both(x, W, b, threshold, method=method)
    assert_same_csr(found, expected)
    assert_same_csr(again, expected)
