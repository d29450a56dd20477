"""One training run from step to step: what is reported, saved and handed over at its end."""

import math
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from saefast import ambient
from saefast.data.source import TARGET, X
from saefast.engines.engine import Engine, StepStats, normalised
from saefast.engines.losses import total_variance
from saefast.engines.recipe import Recipe
from saefast.errors import InputError
from saefast.models.sae import SAE, WEIGHTS
from saefast.training import checkpoint, run_folder
from saefast.training.advice import advice
from saefast.training.feed import Feed, Rows
from saefast.training.heldout import chosen_eval_every, evaluate_heldout, rows_on_the_way
from saefast.training.progress import Bar, MetricsLog
from saefast.training.trend import Point, trend

Line = dict[str, Any]


class Levels(TypedDict, total=False):
    """What runs of several layers or models hold besides."""

    levels: dict[str, Tensor]


class RunState(Levels):
    """What a checkpoint holds of a run."""

    settings: dict[str, dict[str, Any]]
    step: int
    tokens: int
    total_steps: int
    # Of the step done last.
    lr: float
    # The step at which a plateau was found, and the decay begun.
    plateau: int | None
    # `Point`s of the held-out FVU at the peak learning rate.
    curve: list[list[float]]
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

    def __init__(self, step: int, out_dir: Path | None, sae: SAE, call: str = "train") -> None:
        self.step, self.out_dir, self.sae = step, out_dir, sae
        where = (
            f"resume with {call}(..., out_dir={str(out_dir)!r}, resume=True)"
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
    config: Recipe
    total_steps: int
    step: int = 0
    tokens: int = 0
    seconds_before: float = 0.0
    waited_before: float = 0.0
    saved_step: int = 0
    line: Line | None = None
    plateau: int | None = None  # the step at which the decay began because the held-out FVU had stopped falling
    curve: list[Point] = field(default_factory=list)  # the held-out FVU at the peak learning rate
    before: tuple[int, float] | None = None  # of a run that goes on: the steps it was to have, and its last rate
    last: tuple[Rows, StepStats] | None = None  # the batch of the step done last, and its figures
    folder: Path | None = None
    keep: int = 2
    log: MetricsLog | None = None
    on_log: Callable[[Line], None] | None = None
    begun: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.eval_every = chosen_eval_every(self.config, self.total_steps)
        self.mark()

    @property
    def seconds(self) -> float:
        """Seconds of training, earlier parts of a resumed run included."""
        return self.seconds_before + time.perf_counter() - self.begun

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    def decay_from(self, step: int, total_steps: int) -> None:
        """The learning rate falls from `step` on, where there was a plateau, and the run ends with total_steps."""
        self.plateau, self.total_steps = step, total_steps
        self.engine.decay_from(step, total_steps)

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


def advise(runs: Iterable[Run]) -> None:
    """Before the first step: one warning on each thing that is likely to go wrong, about the first run it concerns."""
    found: dict[str, str] = {}
    for run in runs:
        tokens = run.total_steps * run.config.batch_size
        found = advice(run.config, run.total_steps, tokens, run.step, run.before) | found
    for line in found.values():
        warnings.warn(line, RuntimeWarning, stacklevel=5)


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
    evaluates = _due(run.step, run.eval_every)
    if evaluates or _due(run.step, config.log_every):
        line = _line(run, rows, stats)
        _publish(run, line | _evaluate(run, stats, shown) if evaluates else line, shown)
    if _due(run.step, config.save_every):
        _save(run)


def _evaluate(run: Run, stats: StepStats, shown: Bar) -> Line:
    """Held-out figures in mid-run. Where they say that more tokens do not help, the decay begins, if that is asked for.

    Raises:
        InputError: a row holds NaN or inf, and evaluations were asked for.
    """
    try:
        line = evaluate_heldout(run.sae, run.feed, rows_on_the_way(run.config, run.eval_every))
    except InputError as error:
        if run.config.eval_every is not None:
            raise
        warnings.warn(f"no held-out figures: {error}", RuntimeWarning, stacklevel=5)
        run.eval_every = 0
        return {}
    if run.config.stop_at_plateau and not line and run.step == run.eval_every:
        warnings.warn("stop_at_plateau needs held-out rows: nothing is held out", RuntimeWarning, stacklevel=5)
    at_peak = stats.lr == run.config.lr
    if at_peak and line and 0 < line["heldout/fvu_ordinary"] < math.inf:
        run.curve.append(Point(run.tokens, line["heldout/fvu_ordinary"], line["heldout/rows"]))
        line |= _judge(run, shown)
    return line


def _judge(run: Run, shown: Bar) -> Line:
    """The trend so far; on a plateau, ends the run with a decay that begins now, if that is asked for."""
    found = trend(run.curve)
    if found is None:
        return {}
    if found.surely_flat and run.config.stop_at_plateau:
        before = run.total_steps
        run.decay_from(run.step, min(run.step + decay_steps(run.step, before, run.config), before))
        shown.shorten((before - run.total_steps) * run.config.batch_size)
    return {"heldout/fall_per_doubling": found.fall, "details/total_steps": run.total_steps}


def resume_schedule(run: Run, state: Mapping[str, Any]) -> None:
    """The schedule and the curve as a checkpoint holds them, where the run is still to end as it was then."""
    run.before = state["total_steps"], state["lr"]
    if state["plateau"] is not None and run.config.stop_at_plateau:
        run.decay_from(state["plateau"], min(state["total_steps"], run.total_steps))
    if run.engine.lr() <= state["lr"]:
        # Once a decay has begun, a higher rate begins another curve.
        run.curve = [Point(int(tokens), fvu, int(rows)) for tokens, fvu, rows in state["curve"]]


def decay_steps(step: int, total_steps: int, config: Recipe) -> int:
    """How long a decay takes that begins at `step`: the share of the run that it would have had at its end."""
    start = config.lr_decay_start
    share = config.lr_decay_share if start is None or start < 0 else max(1 - start / total_steps, 0.0)
    return max(round(step * share / (1 - share)), 1) if share < 1 else total_steps


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
        | _figures(run, normalised(*rows, run.sae)[1], stats)
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
    fvu, dead, silent = float(stats.fvu), float(stats.dead_share), run.engine.dead.silent(run.tokens)
    paid: Line = {}
    if run.sae.architecture.pointwise is not None:
        paid = {"losses/sparsity_loss": float(stats.sparsity_loss), "details/sparsity_coef": float(stats.sparsity_coef)}
    return paid | {
        "losses/overall_loss": float(stats.loss),
        # Mean over tokens of the summed squared error of scaled inputs, for any kind of loss.
        "losses/mse_loss": fvu * float(total_variance(target)) / len(target),
        "losses/auxiliary_reconstruction_loss": float(stats.auxk_loss),
        "metrics/explained_variance": 1 - fvu,
        "metrics/l0": float(stats.l0),
        "sparsity/dead_features": round(dead * run.sae.config.n_latents),
        "sparsity/silent_share": float(silent.share),
        "sparsity/silent_tokens": silent.tokens,
        "sparsity/never_fired_share": float(silent.never),
        "details/current_learning_rate": stats.lr,
        "details/n_training_samples": run.tokens,
        "details/total_steps": run.total_steps,
        "fvu": fvu,
        "rows_left_out": run.feed.left_out.n_left_out,
        "rows_masked": run.feed.source.rows_masked,
        "dead_share": dead,
        "grad_norm": float(stats.grad_norm),
    }


def _last_heldout(run: Run) -> Line:
    """The held-out figures of the finished SAE, which is handed over even where a row met on the way is not finite."""
    try:
        return evaluate_heldout(run.sae, run.feed)
    except InputError as error:
        warnings.warn(f"no held-out figures: {error}", RuntimeWarning, stacklevel=4)
        return {}


def _prospects(run: Run) -> Line:
    """What the curve says about more tokens, where it says anything, and whether a plateau ended the run."""
    found = trend(run.curve)
    line: Line = {"details/plateau_step": run.plateau} if run.plateau is not None else {}
    if found is not None:
        line |= {"heldout/fall_per_doubling": found.fall, "heldout/fall_error": found.error}
    return line


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
        "total_steps": run.total_steps,
        "lr": 0.0 if run.last is None else run.last[1].lr,
        "plateau": run.plateau,
        "curve": [list(point) for point in run.curve],
        "line": run.line,
        "seconds": run.seconds,
        "waited": run.waited_before + run.feed.waited,
        "scale": run.feed.scale,
        "target_scale": run.feed.target_scale,
        "levels": run.feed.levels,
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
        _publish(run, run.line | _last_heldout(run) | _prospects(run), shown)
    sae = _served(run, run.sae)
    if run.folder is not None:
        with run_folder.writing(run.folder):
            if averaged is not None:
                average = SAE(sae.config, device="meta")
                average.load_state_dict(run.sae.state_dict() | averaged, assign=True)
                _served(run, average).save(run.folder / run_folder.EMA)
            sae.save_weights(run.folder / WEIGHTS)
    return sae


def fold(sae: SAE, scale: float, target_scale: float | None = None, levels: tuple[Tensor, Tensor] | None = None) -> SAE:
    """The SAE for raw inputs x, given one trained on scale · x; see `Architecture.rescaled` and `train`.

    target_scale is what a target that is not x was multiplied by; levels what the columns of x and of the target were,
    before that (`Feed.levels`).

    Shares W_enc and W_dec with the SAE given; only what depends on the scale is new.
    """
    folded = SAE(sae.config, device="meta")
    weights = {name: value.detach() for name, value in sae.state_dict().items()}
    weights |= _folded(sae, weights, scale, scale if target_scale is None else target_scale, levels)
    folded.load_state_dict(weights, assign=True)
    return folded.requires_grad_(True)


def _served(run: Run, sae: SAE) -> SAE:
    """An SAE of this run for raw inputs."""
    return fold(sae, run.feed.scale, run.feed.target_scale, _levels(run))


def _folded(
    sae: SAE, tensors: dict[str, Tensor], scale: float, target_scale: float, levels: tuple[Tensor, Tensor] | None
) -> dict[str, Tensor]:
    """What `fold` changes, as it becomes."""
    changed = sae.architecture.rescaled(tensors, scale, target_scale)
    if levels is None:
        return changed
    return changed | sae.architecture.unlevelled(tensors | changed, *levels)


def _levels(run: Run) -> tuple[Tensor, Tensor] | None:
    """What the columns of x and of the target are multiplied by; None where they have one scale."""
    found = run.feed.levels
    if not found:
        return None
    target = TARGET if run.feed.has_target else X
    one = torch.ones((), dtype=torch.float32, device=run.sae.device)
    return found.get(X, one), found.get(target, one)


def scaled_tensors(run: Run) -> dict[str, Tensor]:
    """What `fold` would change, as it is."""
    tensors = {name: value.detach() for name, value in run.sae.state_dict().items()}
    changed = _folded(run.sae, tensors, run.feed.scale, run.feed.target_scale, _levels(run))
    return {name: tensors[name] for name in changed}


def _get_rng() -> dict[str, Tensor]:
    """The states of torch's global generators: data and models made by the caller may draw from them."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}
    return state
