"""One training run from step to step: what is reported, saved and handed over at its end."""

import math
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from saefast import ambient
from saefast.engines.config import TrainConfig
from saefast.engines.engine import Engine, StepStats
from saefast.engines.losses import total_variance
from saefast.errors import InputError
from saefast.metrics.streaming import Reconstruction
from saefast.models.sae import SAE, WEIGHTS
from saefast.training import checkpoint, run_folder
from saefast.training.feed import Feed, Rows
from saefast.training.progress import Bar, MetricsLog

Line = dict[str, Any]
# Rows that the held-out figures in metrics.jsonl are taken over; `saefast eval` looks at all of them.
HELDOUT_ROWS = 1 << 16


class RunState(TypedDict):
    """What a checkpoint holds of a run."""

    settings: dict[str, dict[str, Any]]
    step: int
    tokens: int
    # The last step's figures wait here for those of the finished SAE, which are measured after the last checkpoint.
    line: Line | None
    seconds: float
    waited: float
    scale: float
    target_scale: float
    left_out: dict[str, Any]
    cursor: dict[str, Any] | None
    ahead: int
    rng: dict[str, Tensor]
    # The SAE in a checkpoint serves raw inputs; its biases times the scale would not be these to the bit.
    scaled: dict[str, Tensor]
    engine: dict[str, Any]


class Stopped(KeyboardInterrupt):
    """Training was interrupted (Ctrl-C or SIGTERM), finished its step and saved. The message says how to go on.

    Attributes:
        step: optimiser steps done.
        out_dir: the run's folder, or None where nothing is saved.
        sae: the SAE as it stands, for raw inputs.
    """

    def __init__(self, step: int, out_dir: Path | None, sae: SAE) -> None:
        self.step, self.out_dir, self.sae = step, out_dir, sae
        where = (
            f"resume with train(..., out_dir={str(out_dir)!r}, resume=True)"
            if out_dir is not None
            else "nothing was saved, because no out_dir was given"
        )
        super().__init__(f"stopped at step {step}; {where}")


@dataclass
class Run:
    """Everything the loop holds on to."""

    sae: SAE
    engine: Engine
    feed: Feed
    config: TrainConfig
    total_steps: int
    step: int = 0
    tokens: int = 0
    seconds_before: float = 0.0
    waited_before: float = 0.0
    saved_step: int = 0
    line: Line | None = None
    last: tuple[Rows, StepStats] | None = None  # the batch of the step done last, and its figures
    folder: Path | None = None
    keep: int = 2
    log: MetricsLog | None = None
    on_log: Callable[[Line], None] | None = None
    begun: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.mark()

    @property
    def seconds(self) -> float:
        """Seconds of training, earlier parts of a resumed run included."""
        return self.seconds_before + time.perf_counter() - self.begun

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    def mark(self) -> None:
        """Speeds are measured from here: called after each log line, evaluation and checkpoint."""
        self.marked = (time.perf_counter(), self.feed.waited, self.tokens)

    def speeds(self) -> Line:
        """Tokens per second, and the share of the time spent waiting for data, since the last mark."""
        then, waited, tokens = self.marked
        passed = max(time.perf_counter() - then, 1e-9)
        return {
            "tokens_per_second": (self.tokens - tokens) / passed,
            "idle_share": min((self.feed.waited - waited) / passed, 1.0),
        }


def advance(run: Run, shown: Bar, stop: threading.Event | None = None) -> bool:
    """One optimiser step, with the log line and the checkpoint due after it; False when none is left to do.

    Ctrl-C in a terminal reaches a DataLoader's workers as well: that drawing data fails once `stop` is set is no error.
    """
    if run.step >= run.total_steps:
        return False
    try:
        rows = run.feed.next(run.step)
    except Exception:
        if stop is not None and stop.is_set():
            return False
        raise
    if rows is None:
        _end_early(run)
        return False
    stats = _step(run, rows)
    run.step += 1
    run.tokens += len(rows.x)
    run.last = (rows, stats)
    shown.advance(len(rows.x))
    if run.step == run.total_steps:
        run.line = _line(run, rows, stats)
    else:
        _report_and_save(run, rows, stats, shown)
    return True


def stopped(run: Run) -> Stopped:
    """Saves a run before its end; the exception to raise."""
    _save(run)
    run.engine.finish()
    return Stopped(run.step, run.folder, _served(run, run.sae))


def _step(run: Run, rows: Rows) -> StepStats:
    try:
        return run.engine.step(*rows)
    except InputError:
        run.feed.confirm()  # where the batch itself was bad, this names its source
        raise


def _report_and_save(run: Run, rows: Rows, stats: StepStats, shown: Bar) -> None:
    """What is due after a step that is not the last. The line comes first: a checkpoint never lacks lines before it."""
    config = run.config
    evaluates = _due(run.step, config.eval_every)
    if evaluates or _due(run.step, config.log_every):
        line = _line(run, rows, stats)
        _publish(run, line | evaluate_heldout(run.sae, run.feed) if evaluates else line, shown)
    if _due(run.step, config.save_every):
        _save(run)


def _due(step: int, every: int) -> bool:
    """Every so many steps; 0 is never."""
    return every > 0 and step % every == 0


def _end_early(run: Run) -> None:
    """The data ended before n_tokens: the step done last is the last one."""
    warnings.warn(
        f"{run.feed.source.source_name} ended after {run.tokens} tokens, at step {run.step} of {run.total_steps}, "
        "before the learning rate's decay did; pass data that can be started again, or lower n_tokens",
        RuntimeWarning,
        stacklevel=4,
    )
    run.total_steps = run.step
    if run.last is not None:
        run.line = _line(run, *run.last)


def _line(run: Run, rows: Rows, stats: StepStats) -> Line:
    """The metrics of a step with a batch of rows. Reads the device.

    Raises:
        InputError: the batch or the loss is not finite.
    """
    run.feed.confirm()
    line = (
        {"step": run.step, "tokens": run.tokens, "seconds": run.seconds}
        | _figures(run, rows.target, stats)
        | run.speeds()
    )
    if not math.isfinite(line["losses/overall_loss"]):
        raise InputError(f"loss is {line['losses/overall_loss']} at step {run.step}: training diverged; lower lr")
    return line


def _publish(run: Run, line: Line, shown: Bar) -> None:
    shown.show(line)
    if run.log is not None:
        with run_folder.writing(run.log.path):
            run.log.write(line)
    if run.on_log is not None:
        with ambient.theirs():
            run.on_log(line)
    run.mark()


def _figures(run: Run, target: Tensor, stats: StepStats) -> Line:
    """A step's figures under the names of SAELens' panels, and FVU and dead share under their own."""
    fvu, dead = float(stats.fvu), float(stats.dead_share)
    return {
        "losses/overall_loss": float(stats.loss),
        # Mean over tokens of the summed squared error of scaled inputs, for any kind of loss.
        "losses/mse_loss": fvu * float(total_variance(target)) / len(target),
        "losses/auxiliary_reconstruction_loss": float(stats.auxk_loss),
        "metrics/explained_variance": 1 - fvu,
        "metrics/l0": float(stats.l0),
        "sparsity/dead_features": round(dead * run.sae.config.n_latents),
        "details/current_learning_rate": stats.lr,
        "details/n_training_samples": run.tokens,
        "fvu": fvu,
        "rows_left_out": run.feed.left_out.n_left_out,
        "dead_share": dead,
        "grad_norm": float(stats.grad_norm),
    }


@torch.no_grad()
def evaluate_heldout(sae: SAE, feed: Feed) -> Line:
    """FVU, explained variance and L0 over (at most HELDOUT_ROWS of) the held-out rows; empty where there are none.

    All rows count, those that training leaves out too; "fvu_ordinary" and "fvu_median" tell of the others.

    In mid-run the SAE is taken as it is: rows without a gradient may be unsettled, which only `finish` changes.

    Raises:
        InputError: a row holds NaN or inf.
    """
    reconstruction, fired, n_rows = Reconstruction(feed.ordinary), 0.0, 0
    for x, target in feed.heldout():
        x_hat, acts, _ = sae(x)
        reconstruction.update(target, x_hat)
        fired, n_rows = fired + float((acts != 0).sum()), n_rows + len(x)
        if n_rows >= HELDOUT_ROWS:
            break
    if n_rows == 0:
        return {}
    found = reconstruction.compute()
    named = {f"heldout/{name}": found[name] for name in ("fvu", "fvu_ordinary", "fvu_median", "explained_variance")}
    return named | {"heldout/l0": fired / n_rows}


def check_heldout(feed: Feed) -> None:
    """At the start of a run: raises InputError where one of the rows that `evaluate_heldout` looks at is not finite."""
    n_rows = 0
    for x, _ in feed.heldout():
        n_rows += len(x)
        if n_rows >= HELDOUT_ROWS:
            return


def _last_heldout(run: Run) -> Line:
    """The held-out figures of the finished SAE, which is handed over even where a row met on the way is not finite."""
    try:
        return evaluate_heldout(run.sae, run.feed)
    except InputError as error:
        warnings.warn(f"no held-out figures: {error}", RuntimeWarning, stacklevel=4)
        return {}


def _save(run: Run) -> None:
    """A checkpoint of this step, unless there is one or nothing happened yet."""
    if run.folder is None or run.saved_step == run.step:
        return
    run.feed.confirm()
    for name, value in run.sae.named_parameters():
        if not all(bound.isfinite() for bound in value.detach().aminmax()):
            raise InputError(
                f"{name} holds NaN or inf at step {run.step}: training diverged; lower lr. It was not saved"
            )
    state: RunState = {
        "settings": run_folder.settings(run.sae.config, run.config),
        "step": run.step,
        "tokens": run.tokens,
        "line": run.line,
        "seconds": run.seconds,
        "waited": run.waited_before + run.feed.waited,
        "scale": run.feed.scale,
        "target_scale": run.feed.target_scale,
        "left_out": run.feed.left_out.state_dict(),
        "cursor": run.feed.cursor,
        "ahead": run.feed.ahead,
        "rng": _get_rng(),
        "scaled": scaled_tensors(run),
        "engine": run.engine.state_dict(),
    }
    folder = run.folder / run_folder.CHECKPOINTS
    with run_folder.writing(folder):
        if run.log is not None:
            run.log.sync()
        checkpoint.save(folder, run.step, _served(run, run.sae), dict(state), run.keep)
    run.saved_step = run.step
    run.mark()


def finish(run: Run, shown: Bar) -> SAE:
    """The last checkpoint, the SAE in its final form and its figures; on disk too where there is a folder."""
    if run.config.save_every:
        _save(run)
    averaged = run.engine.averaged()
    run.engine.finish()
    if run.line is not None:
        _publish(run, run.line | _last_heldout(run), shown)
    sae = _served(run, run.sae)
    if run.folder is not None:
        with run_folder.writing(run.folder):
            if averaged is not None:
                average = SAE(sae.config, device="meta")
                average.load_state_dict(run.sae.state_dict() | averaged, assign=True)
                _served(run, average).save(run.folder / run_folder.EMA)
            sae.save_weights(run.folder / WEIGHTS)
    return sae


def fold(sae: SAE, scale: float, target_scale: float | None = None) -> SAE:
    """The SAE for raw inputs x, given one trained on scale · x; see `Architecture.rescaled` and `train`.

    target_scale is what a target that is not x was multiplied by.

    Shares W_enc and W_dec with the SAE given; only what depends on the scale is new.
    """
    folded = SAE(sae.config, device="meta")
    weights = {name: value.detach() for name, value in sae.state_dict().items()}
    weights |= sae.architecture.rescaled(weights, scale, scale if target_scale is None else target_scale)
    folded.load_state_dict(weights, assign=True)
    return folded.requires_grad_(True)


def _served(run: Run, sae: SAE) -> SAE:
    """An SAE of this run for raw inputs."""
    return fold(sae, run.feed.scale, run.feed.target_scale)


def scaled_tensors(run: Run) -> dict[str, Tensor]:
    """What `fold` would change, as it is."""
    tensors = {name: value.detach() for name, value in run.sae.state_dict().items()}
    changed = run.sae.architecture.rescaled(tensors, run.feed.scale, run.feed.target_scale)
    return {name: tensors[name] for name in changed}


def _get_rng() -> dict[str, Tensor]:
    """The states of torch's global generators: data and models made by the caller may draw from them."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}
    return state
