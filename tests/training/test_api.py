"""train(): equal to a plain loop, honest about its data, quiet, and folded for raw inputs."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_job
from batches import xs
from torch import Tensor

import saefast
from saefast.data.opening import open_source
from saefast.engines.autograd import AutogradEngine
from saefast.engines.config import TrainConfig, preset
from saefast.engines.fused import FusedEngine
from saefast.engines.recipe import Recipe, choose
from saefast.errors import InputError
from saefast.metrics.streaming import Reconstruction
from saefast.models.config import SAEConfig
from saefast.models.init import geometric_median
from saefast.models.sae import SAE, load
from saefast.placement import pick_device
from saefast.training import heldout, run_folder
from saefast.training.api import train
from saefast.training.feed import Feed, input_scale
from saefast.training.heldout import evaluate_heldout
from saefast.training.loop import Stopped, fold
from saefast.training.progress import METRICS, read_metrics

CONFIG = SAEConfig(d_in=12, n_latents=48, k=4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Steps this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**(train_job.CONFIG | {"n_tokens": 32 * 12, "save_every": 0} | changes))


def recipe(**changes: Any) -> Recipe:
    return choose(CONFIG, settings(**changes))


ENGINES = ["autograd", "fused"]


def same(a: SAE, b: SAE) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def plain_loop(data: Any, config: TrainConfig, init_batches: int = 1) -> tuple[SAE, list[float]]:
    """What train() promises, without anything around it."""
    source = open_source(data)
    steps = choose(CONFIG, config, source.n_rows).steps
    draws = source.batches(config.batch_size, config.seed)
    batches = xs(draws, max(steps, init_batches))
    scale = input_scale(torch.cat(batches[:init_batches]), config.normalize)
    sae = SAE(CONFIG, seed=config.seed)
    engine = (AutogradEngine if config.engine == "autograd" else FusedEngine)(sae, config, steps)
    engine.initialise(torch.cat(batches[:init_batches]) * scale)
    losses = [float(engine.step(x * scale).loss) for x in batches[:steps]]
    engine.finish()
    with torch.no_grad():
        sae.b_enc /= scale
        sae.b_dec /= scale
    return sae, losses


@pytest.mark.parametrize("changes", [{}, {"normalize": "none"}, {"multi_topk_coef": 0.1, "decoder_norm": "pre_step"}])
@pytest.mark.parametrize("engine", ENGINES)
def test_equals_a_plain_loop(tmp_path: Path, changes: dict[str, Any], engine: str) -> None:
    config = settings(log_every=1, engine=engine, **changes)
    sae, losses = plain_loop(train_job.rows(), config)
    assert same(train(train_job.rows(), CONFIG, config, tmp_path / "run"), sae)
    assert [line["losses/overall_loss"] for line in read_metrics(tmp_path / "run")] == losses
    assert same(train(train_job.rows(), CONFIG, config), sae)  # nothing on disk changes nothing


@pytest.mark.parametrize("kind", ["array", "iterable"])
def test_rows_that_initialisation_saw_are_trained_on_once(kind: str) -> None:
    config = settings(init_rows=96)
    sae, _ = plain_loop(open_source(train_job.data(kind)), config, init_batches=3)
    assert same(train(open_source(train_job.data(kind)), CONFIG, config), sae)
    assert not same(train(open_source(train_job.data(kind)), CONFIG, settings()), sae)


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_folding_serves_raw_inputs(apply_b_dec: bool, rescale: bool) -> None:
    config = SAEConfig(
        12, 48, 4, dtype="float64", apply_b_dec_to_input=apply_b_dec, rescale_acts_by_decoder_norm=rescale
    )
    sae, x, scale = SAE(config), train_job.rows().double(), 0.37
    with torch.no_grad():
        sae.b_enc.normal_()
        sae.b_dec.normal_()
        sae.W_dec.mul_(1.7)
    scaled, raw = sae(x * scale), fold(sae, scale)(x)
    torch.testing.assert_close(raw.x_hat, scaled.x_hat / scale)
    torch.testing.assert_close(raw.acts, scaled.acts / scale)
    assert torch.equal(raw.idx, scaled.idx)


def test_scales() -> None:
    x = train_job.rows().double()
    assert (x * input_scale(x, "sqrt_d")).norm(dim=1).mean() == pytest.approx(12**0.5)
    assert (x * input_scale(x, "unit_mean_square")).square().sum(1).mean() == pytest.approx(1)
    assert input_scale(x, "none") == 1
    for kind in ("sqrt_d", "median"):
        with pytest.raises(InputError, match="all zero"):
            input_scale(torch.zeros(3, 12), kind)


def test_the_median_scale_is_of_the_spread_alone() -> None:
    x = train_job.rows().double()
    scale = input_scale(x, "median")
    assert ((x - geometric_median(x)) * scale).norm(dim=1).median() == pytest.approx(12**0.5, rel=1e-6)
    assert input_scale(x + 1e5, "median") == pytest.approx(scale, rel=1e-6)
    assert input_scale(x * 1e-3, "median") == pytest.approx(scale * 1e3, rel=1e-6)
    x[::100] *= 1e4
    assert input_scale(x, "median") == pytest.approx(scale, rel=0.05)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_learns_and_heldout_figures_are_of_unseen_rows(tmp_path: Path, engine: str) -> None:
    config = settings(engine=engine, n_tokens=32 * 400, eval_every=100)
    sae = train(train_job.rows(2000), CONFIG, config, tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run") if "heldout/fvu" in line]
    assert [line["step"] for line in lines] == [100, 200, 300, 400]
    assert lines[-1]["heldout/fvu"] < 0.16 < lines[0]["heldout/fvu"]
    held = Reconstruction()
    x = torch.cat(xs(open_source(train_job.rows(2000)).heldout(64)))
    held.update(x, sae(x).x_hat.detach())
    assert lines[-1]["heldout/fvu"] == pytest.approx(held.compute()["fvu"], rel=1e-4)
    assert lines[-1]["heldout/l0"] == pytest.approx(float((sae(x).acts != 0).sum(1).float().mean()))


def test_metrics_are_named_as_in_saelens(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    config = settings(log_every=5)
    train(train_job.rows(), CONFIG, config, tmp_path / "run", on_log=lines.append)
    assert read_metrics(tmp_path / "run") == lines
    assert [line["step"] for line in lines] == [5, 10, 12]
    for line in lines:
        assert {
            "step", "tokens", "seconds", "fvu", "dead_share", "tokens_per_second", "idle_share", "grad_norm",
            "losses/overall_loss", "losses/mse_loss", "losses/auxiliary_reconstruction_loss",
            "metrics/explained_variance", "metrics/l0", "sparsity/dead_features", "details/current_learning_rate",
            "details/n_training_samples", "details/total_steps", "sparsity/silent_share", "sparsity/silent_tokens",
            "sparsity/never_fired_share",
        } <= set(line)  # fmt: skip
        assert line["tokens"] == line["details/n_training_samples"] == 32 * line["step"]
        assert line["metrics/explained_variance"] == 1 - line["fvu"]
        assert line["sparsity/dead_features"] == round(line["dead_share"] * 48)
        assert 0 <= line["idle_share"] <= 1
        assert line["tokens_per_second"] > 0


def test_mse_loss_is_per_token_whatever_the_loss(tmp_path: Path) -> None:
    config = settings(loss="sum", auxk_coef=0.0, log_every=1)
    train(train_job.rows(), CONFIG, config, tmp_path / "run")
    for line in read_metrics(tmp_path / "run"):
        assert line["losses/mse_loss"] == pytest.approx(line["losses/overall_loss"], rel=1e-5)


def test_quiet_unless_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(train_job.rows(), CONFIG, settings(), tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")
    train(train_job.rows(), CONFIG, settings(), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert all(word in err for word in ("train", "tok/s", "loss", "FVU", "L0", "silent"))


def test_the_folder_holds_what_is_needed_to_use_the_sae_and_to_train_it_again(tmp_path: Path) -> None:
    config = settings(device="auto")
    sae = train(train_job.rows(), CONFIG, config, tmp_path / "run")
    assert same(saefast.load(tmp_path / "run"), sae.cpu())
    assert run_folder.read_config(tmp_path / "run") == (CONFIG, config)
    assert run_folder.read_config(tmp_path / "run" / "config.json") == (CONFIG, config)
    again = train(train_job.rows(), *run_folder.read_config(tmp_path / "run"), tmp_path / "again")
    assert same(again, sae)
    names = {"config.json", "metrics.jsonl", "sae.safetensors"}  # and checkpoints, but for save_every=0
    assert {path.name for path in (tmp_path / "run").iterdir()} == names


def test_config_of_a_saved_sae_has_default_training(tmp_path: Path) -> None:
    SAE(CONFIG).save(tmp_path)
    assert run_folder.read_config(tmp_path) == (CONFIG, TrainConfig())


def test_moving_average_is_saved_beside(tmp_path: Path) -> None:
    config = settings(ema_decay=0.5, normalize="sqrt_d")
    sae = train(train_job.rows(), CONFIG, config, tmp_path / "run")
    average = load(tmp_path / "run" / "ema")
    assert not same(average, sae)
    x = train_job.rows()
    wrong = ((average(x).x_hat - x).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert wrong < 0.9  # of raw inputs, so folded like the rest


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_row_in_a_file_is_named_and_nothing_saved_is_lost(tmp_path: Path, bad: float) -> None:
    x = train_job.rows()
    np.save(tmp_path / "good.npy", x.numpy())
    source = open_source(tmp_path / "good.npy")
    draws = source.batches(32, seed=3)
    for _ in range(8):
        next(draws)
    row = int(source.describe_row(5).split()[-1])
    x[row, 3] = bad
    np.save(tmp_path / "bad.npy", x.numpy())
    with pytest.raises(InputError, match=rf"step 7: row 5 of the batch .*bad\.npy row {row}"):
        train(tmp_path / "bad.npy", CONFIG, settings(save_every=3), tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_00000003", "step_00000006"]
    # Whoever repairs the row goes on from there.
    (tmp_path / "good.npy").replace(tmp_path / "bad.npy")
    assert same(train(tmp_path / "bad.npy", CONFIG, settings(), tmp_path / "run", resume=True),
                train(train_job.rows(), CONFIG, settings()))  # fmt: skip


def test_bad_first_batch_leaves_no_folder(tmp_path: Path) -> None:
    x = torch.full((64, 12), float("nan"))
    with pytest.raises(InputError, match="step 0: row 0"):
        train(x, CONFIG, settings(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_row_before_the_first_checkpoint_leaves_no_folder(tmp_path: Path) -> None:
    x = train_job.rows()
    draws = open_source(x).batches(32, seed=3)
    last = xs(draws, 8)[-1]
    x[(x == last[5]).all(1), 3] = float("nan")
    (tmp_path / "there").mkdir()
    for folder in ("made/run", "there"):
        with pytest.raises(InputError, match="step 7: row 5"):
            train(x, CONFIG, settings(save_every=0, log_every=2), tmp_path / folder)
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]
    # A log that was there before is nobody's to remove.
    (tmp_path / "there" / "metrics.jsonl").write_text("")
    with pytest.warns(RuntimeWarning, match="no checkpoint"), pytest.raises(InputError, match="step 7: row 5"):
        train(x, CONFIG, settings(save_every=0), tmp_path / "there", resume=True)
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("kind", ["array", "callable", "generator"])
def test_deferred_check_names_the_row_where_it_can(kind: str) -> None:
    """The way a GPU's batches are checked, on tensors that happen to lie on the CPU."""
    x = train_job.rows()
    x[:, 0] = torch.arange(len(x))
    feed = Feed(open_source(x), recipe(), torch.device("cpu"), torch.float32)
    rows = torch.cat([feed.next(step).x for step in range(6)])[:, 0].long()  # type: ignore[union-attr]
    x[rows[4 * 32 + 7], 1] = torch.inf
    sources = {"array": x, "callable": lambda: iter(x[rows].split(50)), "generator": iter(x[rows].split(50))}
    source = open_source(sources[kind], heldout=0.05 if kind == "array" else 0, shuffle_rows=0)
    feed = Feed(source, recipe(), torch.device("cpu"), torch.float32)
    feed.deferred = True
    for step in range(3):
        feed.next(step)
    feed.confirm()
    for step in range(3, 6):
        feed.next(step)
    said = {
        "array": f"row 7 of the batch holds NaN or inf: the array row {rows[4 * 32 + 7]};",
        "generator": "the batch from",
    }
    with pytest.raises(InputError, match=f"step 4: {said.get(kind, 'row 7 of the batch .* batch 2 of the iterable')}"):
        feed.confirm()
    feed.confirm()


def test_divergence_stops_before_anything_is_saved(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="diverged"):
        train(train_job.rows(), CONFIG, settings(lr=1e30, save_every=1, decoder_norm="never"), tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        assert all(bool(p.isfinite().all()) for p in load(path).parameters())


def test_length_of_a_run() -> None:
    source = open_source(train_job.rows(1000), heldout=0)
    for n_tokens, steps in ((None, 31), (100, 3), (5, 1)):
        assert choose(CONFIG, settings(n_tokens=n_tokens), source.n_rows).steps == steps
    assert choose(CONFIG, settings(n_tokens=None, n_epochs=3), source.n_rows).steps == 93
    with pytest.raises(InputError, match=r"n_tokens is None and the data has no known length: set n_tokens"):
        train(train_job.data("iterable"), CONFIG, settings(n_tokens=None))


def test_a_generator_that_ends_early_gives_an_sae_and_a_warning(tmp_path: Path) -> None:
    config = settings(n_tokens=32 * 40, log_every=15, eval_every=0)
    with pytest.warns(RuntimeWarning, match=r"ended after 950 tokens, at step 30 of 40"):
        sae = train(iter(train_job.rows(1000).split(50)), CONFIG, config, tmp_path / "run")
    assert same(load(tmp_path / "run"), sae)
    last = read_metrics(tmp_path / "run")
    assert [line["step"] for line in last] == [15, 30]
    assert last[-1]["tokens"] == 950
    assert "heldout/fvu" in last[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume": True}, "out_dir is None"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"train_config": settings(device="cuda:77")}, "device is 'cuda:77'"),
        ({"train_config": settings(device="quantum")}, "device is 'quantum'"),
        ({"sae_config": SAEConfig(13, 48, 4)}, "12 columns, expected d_in = 13"),
        ({"batches": 7}, "nothing to train on"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    arguments = {"batches": train_job.rows(), "sae_config": CONFIG, "train_config": settings()} | changes
    with pytest.raises(InputError, match=message):
        train(**arguments)


def test_a_second_run_does_not_touch_the_first(tmp_path: Path) -> None:
    train(train_job.rows(), CONFIG, settings(), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(
        InputError, match="already holds a run: continue it with resume=True, or choose another out_dir"
    ):
        train(train_job.rows(), CONFIG, settings(seed=9), tmp_path / "run")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_ctrl_c_without_a_folder_hands_over_the_sae() -> None:
    def interrupt(line: dict[str, Any]) -> None:
        if line["step"] == 6:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped at step 6; nothing was saved") as caught:
        train(train_job.rows(), CONFIG, settings(), on_log=interrupt)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert isinstance(caught.value, KeyboardInterrupt)
    assert caught.value.step == 6
    x = train_job.rows()
    assert (caught.value.sae(x).x_hat - x).square().sum() < (x - x.mean(0)).square().sum()


def test_in_a_thread() -> None:
    """Signals belong to the main thread; training does not."""
    results: list[SAE] = []
    thread = threading.Thread(target=lambda: results.append(train(train_job.rows(), CONFIG, settings())))
    thread.start()
    thread.join()
    assert same(results[0], train(train_job.rows(), CONFIG, settings()))


def test_heldout_rows_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heldout, "HELDOUT_ROWS", 64)
    seen: list[int] = []
    sae = SAE(CONFIG, seed=0)
    forward = sae.forward
    monkeypatch.setattr(sae, "forward", lambda x: seen.append(len(x)) or forward(x))
    feed = Feed(open_source(train_job.rows(), heldout=0.5), recipe(), torch.device("cpu"), torch.float32)
    names = ("fvu", "fvu_ordinary", "fvu_median", "explained_variance", "l0", "rows", "silent_share")
    assert set(evaluate_heldout(sae, feed)) == {f"heldout/{name}" for name in names}
    assert sum(seen) == 64
    none = Feed(open_source(train_job.rows(), heldout=0), recipe(), torch.device("cpu"), torch.float32)
    assert evaluate_heldout(sae, none) == {}


def test_presets_run_and_resume_settings(tmp_path: Path) -> None:
    for name in ("openai", "sparsify", "dictionary_learning", "saelens"):
        changes = {**train_job.CONFIG, "n_tokens": 256, "init_rows": 64, "auxk_k": 4}
        sae_config, config = preset(name, 12, 48, 4, **changes)
        train(train_job.rows(), sae_config, config, tmp_path / name)
        last = read_metrics(tmp_path / name)[-1]
        assert last["step"] == 8
        assert np.isfinite(last["losses/overall_loss"])


def test_progress_file_is_only_json_lines(tmp_path: Path) -> None:
    train(train_job.rows(), CONFIG, settings(), tmp_path / "run")
    raw = (tmp_path / "run" / METRICS).read_bytes()
    assert raw.endswith(b"}\n")
    assert raw.count(b"\n") == len(read_metrics(tmp_path / "run"))
    with pytest.raises(InputError, match="does not exist"):
        read_metrics(tmp_path)


def test_device() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    def run(batches: Tensor, out: Path, resume: bool = False, **changes: Any) -> SAE:
        return train(batches, CONFIG, settings(device="cuda", save_every=3, **changes), out, resume=resume)

    whole = run(train_job.rows(), tmp_path / "whole")
    assert whole.device.type == "cuda"
    (tmp_path / "part").mkdir()
    os.rename(tmp_path / "whole" / "checkpoints", tmp_path / "part" / "checkpoints")
    os.rename(tmp_path / "part" / "checkpoints" / "step_00000012", tmp_path / "gone")
    assert same(run(train_job.rows(), tmp_path / "part", resume=True), whole)
    x = train_job.rows()
    x[::3] = torch.nan
    with pytest.raises(InputError, match="the array row"):
        run(x, tmp_path / "bad")
