"""Numbers at the edge: each works or is refused in one line that names the cause."""

import functools
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saefast import ops
from saefast.analysis.evaluation import evaluate, evaluate_run
from saefast.data.iterable_source import IterableSource
from saefast.data.live_buffer import LiveBuffer
from saefast.data.opening import open_source
from saefast.data.shard_writer import ShardWriter
from saefast.data.source import Batch, Source
from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, load
from saefast.ops import reference, triton_sddmm, triton_spmm
from saefast.optim.dispatch import row_ops
from saefast.optim.state import AdamStep, DriftTable, Matrix
from saefast.training.api import train
from saefast.training.feed import input_scale
from saefast.training.progress import METRICS, read_metrics

CONFIG = SAEConfig(d_in=24, n_latents=64, k=4)
COMMON: dict[str, Any] = dict(n_epochs=1, batch_size=128, init_rows=128, device="cpu", log_every=5)
ENGINES = pytest.mark.parametrize("engine", ["fused", "autograd"])


def made(n: int = 2000, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 24, generator=torch.Generator().manual_seed(0)).to(dtype)


def strict(file: Path) -> list[dict[str, Any]]:
    """The lines of a file, by a reader that takes no NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text(encoding="utf-8").splitlines()]


# Adam's constants.


@pytest.mark.parametrize("betas", [(0.9, 0.0), (0.999, 0.5), (0.9, 0.81)])
def test_momentum_that_outlives_the_squares_is_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(InputError, match=rf"beta1 is {betas[0]} and beta2 {betas[1]}: expected beta1 < √beta2"):
        TrainConfig(beta1=betas[0], beta2=betas[1])


@ENGINES
@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.999), (0.9, 0.9)])
def test_odd_betas_train(engine: str, betas: tuple[float, float]) -> None:
    config = TrainConfig(**COMMON, engine=engine, lr=1e-2, beta1=betas[0], beta2=betas[1])
    sae = train(made(), CONFIG, config)
    assert all(p.isfinite().all() for p in sae.parameters())
    assert evaluate(sae, [made()]).compute()["fvu"] < 0.7


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.5), (0.9, 0.9), (0.9, 0.85), (0.5, 0.3)])
def test_a_row_left_alone_for_long_keeps_numbers(betas: tuple[float, float]) -> None:
    """Powers of the betas vanish and overflow on the way; their product does neither."""
    table = DriftTable(*betas, 1e-8)
    table.load(torch.zeros(2, 20_000, dtype=torch.float64))
    table.add(1e-3)
    assert table.drift[:20_000].isfinite().all()
    assert not table.drift_eps[:20_000].isnan().any()
    matrix = Matrix.of(torch.ones(3, 4))
    matrix.m.fill_(0.1)
    matrix.v.fill_(0.01)
    step = AdamStep(20_000, *betas, 1e-3, 1e-8, table.drift, table.drift_eps)
    row_ops(matrix.w).catch_up(matrix, step)
    assert matrix.w.isfinite().all()
    if betas[0] == 0:
        assert torch.equal(matrix.w, torch.ones(3, 4)), "without momentum a row that rests does not move"


# Data of odd size.


@ENGINES
def test_scaled_mse_of_constant_data_is_refused(engine: str) -> None:
    with pytest.raises(InputError, match="the first 128 rows are all equal, and loss 'scaled_mse' divides by their"):
        train(torch.ones(2000, 24), CONFIG, TrainConfig(**COMMON, engine=engine, loss="scaled_mse"))


@ENGINES
@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_float64_trains_at_any_size(engine: str, size: float) -> None:
    config = SAEConfig(24, 64, 4, dtype="float64")
    found = [train(made(dtype=torch.float64) * s, config, TrainConfig(**COMMON, engine=engine)) for s in (1, size)]
    assert torch.allclose(found[0].W_dec, found[1].W_dec, rtol=1e-6, atol=1e-9)
    assert torch.allclose(found[0].b_dec * size, found[1].b_dec, rtol=1e-4)


@ENGINES
@pytest.mark.parametrize(
    ("data", "normalize", "message"),
    [
        (made() * 1e-41, "sqrt_d", r"the first 128 rows are too small for torch.float32 \(9.8e-42"),
        (made() * 1e-41, "none", r"the inputs are too small \(3...-41 at most, and float32 cannot hold their squares"),
        (made() * 1e-30, "none", r"the inputs are too small \(3...-30 at most, and float32 cannot hold their squares"),
        (made() * 1e30, "none", r"the inputs are too large \(3...\+30 at most, and float32 cannot hold their squares"),
        (made(dtype=torch.float64) * 1e300, "sqrt_d", r"row 0 .*\(numbers beyond 3.4e\+38 are inf in float32\)"),
        (made(dtype=torch.float64) * 1e-300, "sqrt_d", "all zero in torch.float32"),
        (made() * 1e-41, "median", r"the first 128 rows are too small for torch.float32 \(9.7e-42"),
        (made(dtype=torch.float64) * 1e-300, "median", "all zero in torch.float32"),
        (torch.full((2000, 24), 7.0), "median", "all rows of the batch are equal, so their variance is 0"),
        (torch.full((2000, 24), 7.1), "median", "all rows of the batch are equal, so their variance is 0"),
    ],
    ids=[
        *("denormal", "denormal unscaled", "tiny unscaled", "huge unscaled", "beyond float32", "below float32"),
        *("denormal by the median", "below float32 by the median", "equal", "equal and odd"),
    ],
)
def test_what_float32_cannot_hold_is_refused_by_its_name(
    engine: str, data: Tensor, normalize: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(data, CONFIG, TrainConfig(**COMMON, engine=engine, normalize=normalize))


@pytest.mark.parametrize("form", ["array", "file", "iterable", "buffer", "held out", "evaluated"])
@pytest.mark.parametrize(("dtype", "remark"), [
    (torch.float16, r"\(overflow in float16, which ends at 65504: store the activations in bfloat16\)"),
    (torch.bfloat16, r"\(numbers beyond 3.4e\+38 are inf in bfloat16\)"),
])  # fmt: skip
def test_what_overflowed_in_half_precision_is_called_that(
    tmp_path: Path, form: str, dtype: torch.dtype, remark: str
) -> None:
    x = made().to(dtype)
    bad = -1 if form in ("held out", "evaluated") else 3
    x[bad, 5] = 1e5 if dtype == torch.float16 else float("inf")
    torch.save(x, tmp_path / "rows.pt")
    data: Any = {"file": tmp_path / "rows.pt", "iterable": lambda: iter(x.split(500))}.get(form, x)
    if form == "buffer":
        data = LiveBuffer(IterableSource(lambda: iter(x.split(500)), heldout=0), reservoir_rows=600)
    SAE(CONFIG).save(tmp_path / "run")
    evaluated = functools.partial(evaluate_run, tmp_path / "run", tmp_path / "rows.pt")
    trained = functools.partial(train, data, CONFIG, TrainConfig(**COMMON, n_tokens=4000))
    with pytest.raises(InputError, match=rf"holds NaN or inf: .*repair (that row|it) {remark}$"):
        (evaluated if form == "evaluated" else trained)()


def test_nan_is_called_nan_and_nothing_else() -> None:
    bad = made()
    bad[:, 3] = float("nan")
    with pytest.raises(InputError, match=r"row 0 of the batch holds NaN or inf: the array row \d+; drop"):
        train(bad, CONFIG, TrainConfig(**COMMON))


def test_scales_of_odd_sizes() -> None:
    x = made(dtype=torch.float64)
    for kind in ("median", "sqrt_d", "unit_mean_square"):
        for size in (1e-300, 1e300):
            assert math.isclose(input_scale(x * size, kind) * size, input_scale(x, kind), rel_tol=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_fired_above_is_a_number(value: float) -> None:
    with pytest.raises(InputError, match=f"fired_above is {value}: expected a finite number, or None"):
        TrainConfig(fired_above=value)


# The model.


def test_half_is_saved_as_half(tmp_path: Path) -> None:
    sae = SAE(CONFIG, seed=0).half()
    sae.save(tmp_path)
    read = load(tmp_path)
    assert read.dtype == torch.float16
    assert read.config.dtype == "float16"
    assert torch.equal(read(made(9)).x_hat, sae(made(9)).x_hat)


def test_decoder_rows_of_zeros_decode_to_zeros() -> None:
    sae = SAE(SAEConfig(24, 64, 4, rescale_acts_by_decoder_norm=True), seed=0)
    with torch.no_grad():
        sae.W_dec[3] = 0
    f = torch.ones(2, 64)
    without = f.clone()
    without[:, 3] = 0
    assert torch.equal(sae.decode(f), sae.decode(without))
    acts, idx = torch.ones(2, 2), torch.tensor([[3, 5], [5, 3]], dtype=torch.int32)
    assert torch.equal(sae.decode_sparse(acts, idx), sae.decode_sparse(acts[:, :1], torch.tensor([[5], [5]])))
    (sae.decode(sae.encode(made(9))).sum() + sae(made(9)).x_hat.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sae.parameters())


KERNELS = SimpleNamespace(
    spmm=triton_spmm.spmm, sddmm=triton_sddmm.sddmm, spmm_t=triton_spmm.spmm_t, sum_by_latent=triton_spmm.sum_by_latent
)


@pytest.mark.parametrize("module", [ops, reference, KERNELS], ids=["ops", "reference", "kernels"])
@pytest.mark.parametrize("shape", [(5, 0), (0, 4), (0, 0)])
def test_codes_of_nothing(module: Any, shape: tuple[int, int]) -> None:
    acts, idx, W, x = torch.ones(shape), torch.zeros(shape, dtype=torch.int32), made(64), made(shape[0])
    assert torch.equal(module.spmm(acts, idx, W), torch.zeros(shape[0], 24))
    assert module.sddmm(x, idx, W).shape == shape
    assert torch.equal(module.spmm_t(acts, idx, x, 64), torch.zeros(64, 24))
    assert torch.equal(module.sum_by_latent(acts, idx, 64), torch.zeros(64))


@pytest.mark.parametrize("rescale", [True, False])
def test_an_sae_decodes_a_code_of_nothing(rescale: bool) -> None:
    sae = SAE(SAEConfig(24, 64, 4, rescale_acts_by_decoder_norm=rescale), seed=0)
    x_hat = sae.decode_sparse(torch.ones(2, 3, 0), torch.zeros(2, 3, 0, dtype=torch.int32))
    assert torch.equal(x_hat, sae.b_dec.expand(2, 3, 24))
    assert sae(torch.ones(0, 24)).x_hat.shape == (0, 24)
    x_hat.sum().backward()


def test_complex_numbers_are_refused() -> None:
    sae, x = SAE(CONFIG, seed=0), made(9)
    calls: list[tuple[str, Any]] = [
        ("x", lambda: sae(x + 0j)),
        ("x", lambda: sae.encode(x + 0j)),
        ("f", lambda: sae.decode(sae.encode(x) + 0j)),
        ("acts", lambda: sae.decode_sparse(sae(x).acts + 0j, sae(x).idx)),
        ("x", lambda: evaluate(sae, [x + 0j])),
        ("the array", lambda: train(made() + 0j, CONFIG, TrainConfig(**COMMON))),
        ("x", lambda: ops.encode_topk(x + 0j, x + 0j, None, 2)),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, call in calls:
            with pytest.raises(InputError, match=f"{name} (is|has dtype) torch.complex64"):
                call()


# The held-out share, and the log.


def with_bad(kind: str, value: float, folder: Path) -> tuple[Any, str]:
    """Data whose held-out share has a bad row, and where that row comes from."""
    x = made()
    x[-5, 3] = value
    if kind == "array":
        return x, "the array row 1995"
    if kind == "file":
        np.save(folder / "x.npy", x.numpy())
        return folder / "x.npy", f"{folder / 'x.npy'} row 1995"
    return lambda: iter([*x[:1900].split(100), x[1900:]]), "batch 19 of the iterable, row 95"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["array", "file"])
def test_a_bad_heldout_row_is_named_before_training(kind: str, value: float, tmp_path: Path) -> None:
    data, where = with_bad(kind, value, tmp_path)
    with pytest.raises(InputError, match=rf"held-out row 95 holds NaN or inf: {where}[ ;]"):
        train(data, CONFIG, TrainConfig(**COMMON), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_bad_heldout_row_met_on_the_way_is_named(tmp_path: Path) -> None:
    data, where = with_bad("iterable", math.nan, tmp_path)
    settings = COMMON | dict(n_tokens=6000)
    with pytest.raises(InputError, match=f"held-out row 95 holds NaN or inf: {where}; drop or repair that row"):
        train(data, CONFIG, TrainConfig(**settings, eval_every=20))
    with pytest.warns(RuntimeWarning, match=f"no held-out figures: held-out row 95 holds NaN or inf: {where}"):
        sae = train(data, CONFIG, TrainConfig(**settings), tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), load(tmp_path / "run").parameters(), strict=True))
    assert "heldout/fvu" not in strict(tmp_path / "run" / METRICS)[-1]


@pytest.mark.parametrize("shuffle", ["mapped", "buffer"])
def test_a_bad_heldout_row_of_a_harvest_is_named_with_its_token(shuffle: Any, tmp_path: Path) -> None:
    x, n = made(), 1900
    x[-5, 3] = math.nan
    with ShardWriter(tmp_path / "acts", [{"name": "h", "hf_name": "h"}], "float32", shuffle_seed=None) as writer:
        writer.add_sequences(0, [0, 1], [list(range(n)), list(range(len(x) - n))])
        for number, (split, rows) in enumerate({"train": x[:n], "heldout": x[n:]}.items()):
            writer.add(split, {"h": rows}, torch.full((len(rows),), number), torch.arange(len(rows)))
        writer.commit({}, complete=True)
    source = open_source(tmp_path / "acts", shuffle=shuffle)
    with pytest.raises(
        InputError, match=r"held-out row 95 holds NaN or inf: .* row 95 \(sequence 1, position 95\); drop"
    ):
        train(source, CONFIG, TrainConfig(**COMMON))


class Constant(Source):
    """Rows that differ, and held-out rows that do not: their FVU does not exist."""

    n_rows, source_name = 2000, "constant"
    widths = {"x": 24}  # noqa: RUF012

    def batches(self, batch_size: int, *args: Any, **kwargs: Any) -> Iterator[Batch]:
        yield from ({"x": part} for part in made().split(batch_size))

    def heldout(self, batch_size: int, *args: Any, **kwargs: Any) -> Iterator[Batch]:
        yield {"x": torch.ones(batch_size, 24)}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def describe_row(self, i: int, name: str = "x") -> str:
        return f"row {i}"


def test_metrics_are_strict_json(tmp_path: Path) -> None:
    train(Constant(), CONFIG, TrainConfig(**COMMON, eval_every=5), tmp_path)
    lines = strict(tmp_path / METRICS)
    assert lines == read_metrics(tmp_path)
    assert [line["heldout/fvu"] for line in lines if "heldout/fvu" in line] == [None] * len(lines)
    assert all(isinstance(line["fvu"], float) for line in lines)
