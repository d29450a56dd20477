"""train(): the loop from batches to a trained SAE, with metrics, checkpoints, resume and a clean stop."""

import contextlib
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from saefast import checkpoint, rundir
from saefast.data.source import Source
from saefast.data.sources import open_source
from saefast.engine import Engine, StepStats
from saefast.errors import InputError
from saefast.feed import Feed, input_scale
from saefast.losses import total_variance
from saefast.metrics import Reconstruction
from saefast.progress import Bar, MetricsLog, bar
from saefast.recipe import TrainConfig
from saefast.sae import SAE, WEIGHTS, SAEConfig, load

Line = dict[str, Any]
# Rows that the held-out figures in metrics.jsonl are taken over; `saefast eval` looks at all of them.
HELDOUT_ROWS = 1 << 16


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


def train(
    batches: Any,
    sae_config: SAEConfig,
    train_config: TrainConfig | None = None,
    out_dir: str | Path | None = None,
    *,
    resume: bool = False,
    keep_checkpoints: int = 2,
    progress: bool | None = None,
    on_log: Callable[[Line], None] | None = None,
) -> SAE:
    """Trains a sparse autoencoder.

    Inputs are scaled by one number s first, as `TrainConfig.normalize` says, estimated on the first rows and then
    fixed. The SAE returned and every SAE saved serve raw inputs: TopK and ReLU commute with a positive factor, so
    dividing b_enc and b_dec by s and leaving W_enc and W_dec alone gives
    TopK(W_enc (x - b_dec/s) + b_enc/s) = acts(s·x) / s, and a reconstruction of x rather than of s·x.

    With out_dir, the run's folder (see saefast.rundir) gets config.json, metrics.jsonl, checkpoints, and at the
    end sae.safetensors. A run that was killed at any moment goes on with resume=True, bit for bit as if nothing had
    happened (same device and machine); where there is no checkpoint yet, it starts at the beginning.

    Ctrl-C or SIGTERM ends the run after the step that is under way, with a checkpoint; a second one ends it at once.

    Args:
        batches: a shard folder, a .npy, .pt or .safetensors file, an array, an iterable of (B, d_in) tensors, a
            function that returns one, or a `Source`. See `saefast.data.sources.open_source`.
        sae_config: what to train.
        train_config: how; the defaults are the preset "saefast". n_tokens = None is one pass over the data.
        out_dir: the run's folder, or None to keep nothing on disk.
        resume: go on from the newest checkpoint in out_dir.
        keep_checkpoints: how many checkpoints to keep.
        progress: show a bar on stderr; None is only in a terminal.
        on_log: called with every line of metrics.

    Returns:
        The trained SAE on the training device, for raw inputs.

    Raises:
        InputError: settings that do not fit the data, rows with NaN or inf (naming step, row and source), a folder
            that holds a run already or cannot be written, a checkpoint of another run, a diverged loss. What was
            saved stays.
        Stopped: after Ctrl-C or SIGTERM; a KeyboardInterrupt.
    """
    config = train_config if train_config is not None else TrainConfig()
    if keep_checkpoints < 1:
        raise InputError(f"keep_checkpoints is {keep_checkpoints}: expected at least 1")
    folder = None if out_dir is None else Path(out_dir).expanduser()
    if resume and folder is None:
        raise InputError("resume is True but out_dir is None: give the folder of the run to go on with")
    with (
        opened(batches, sae_config, config, folder, resume, keep_checkpoints, on_log) as run,
        bar(run.total_steps * config.batch_size, run.tokens, progress) as shown,
        stop_signals() as stop,
    ):
        while not stop.is_set() and advance(run, shown):
            pass
        if run.step < run.total_steps:
            raise stopped(run)
        return finish(run, shown)


def count_steps(source: Source, config: TrainConfig) -> int:
    """Optimiser steps of a run: whole batches in n_tokens, or in one pass over the data; at least one.

    Raises:
        InputError: neither number is known.
    """
    tokens = config.n_tokens if config.n_tokens is not None else source.n_rows
    if tokens is None:
        raise InputError(
            f"n_tokens is None and {source.source_name} has no known length: set n_tokens, which the learning rate's "
            "decay is laid out over"
        )
    return max(tokens // config.batch_size, 1)


def pick_device(name: str) -> torch.device:
    """The device TrainConfig.device names; "auto" is the GPU if there is one. Raises InputError for one not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device is {name!r}, which is not there ({str(error).splitlines()[0]}): try 'auto'") from None
    return device


def make_engine(sae: SAE, config: TrainConfig, total_steps: int) -> Engine:
    """The engine that config.engine names."""
    if config.engine == "autograd":
        from saefast.autograd_step import AutogradStep

        return AutogradStep(sae, config, total_steps)
    try:
        from saefast.step import FusedStep  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError as error:
        raise InputError("engine 'fused' is not in this version of saefast: use engine='autograd'") from error
    fused: Engine = FusedStep(sae, config, total_steps)
    return fused


def fold(sae: SAE, scale: float) -> SAE:
    """The SAE for raw inputs x, given one trained on scale · x: b_enc and b_dec divided by scale. See `train`.

    Shares W_enc and W_dec with the SAE given; only the biases are new.
    """
    folded = SAE(sae.config, device="meta")
    weights = {name: value.detach() for name, value in sae.state_dict().items()}
    weights |= {name: weights[name] / scale for name in ("b_enc", "b_dec")}
    folded.load_state_dict(weights, assign=True)
    return folded.requires_grad_(True)


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
    last: tuple[Tensor, StepStats] | None = None  # the batch of the step done last, and its figures
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


@contextlib.contextmanager
def opened(
    batches: Any,
    sae_config: SAEConfig,
    config: TrainConfig,
    folder: Path | None,
    resume: bool,
    keep_checkpoints: int,
    on_log: Callable[[Line], None] | None,
) -> Iterator[Run]:
    """A run ready for its next step, new or resumed; its folder is locked until the block ends. See `train`."""
    with contextlib.ExitStack() as stack:
        if folder is not None:
            stack.enter_context(rundir.locked(folder))
            if not resume:
                rundir.check_new(folder)
        source = open_source(batches, d_in=sae_config.d_in)
        run = _begin(source, sae_config, config, folder if resume else None)
        run.on_log = on_log
        if folder is not None:
            _open_folder(run, folder, keep_checkpoints)
            stack.callback(run.close)
        yield run


def _begin(source: Source, sae_config: SAEConfig, config: TrainConfig, resume_from: Path | None) -> Run:
    """A new run, or the one whose newest checkpoint lies in the folder `resume_from`."""
    total_steps = count_steps(source, config)
    if resume_from is not None:
        path = checkpoint.latest(resume_from / rundir.CHECKPOINTS)
        if path is not None:
            return _restore(path, source, sae_config, config, total_steps)
        warnings.warn(f"{resume_from} holds no checkpoint: starting from the beginning", RuntimeWarning, stacklevel=3)
    device = pick_device(config.device)
    sae = SAE(sae_config, seed=config.seed, device=device)
    engine = make_engine(sae, config, total_steps)
    feed = Feed(source, config, device, sae.dtype)
    rows = feed.look_ahead(config.init_rows or config.batch_size)
    feed.scale = input_scale(rows, config.normalize)
    engine.initialise((rows * feed.scale).to(sae.dtype))
    return Run(sae, engine, feed, config, total_steps)


def _restore(path: Path, source: Source, sae_config: SAEConfig, config: TrainConfig, total_steps: int) -> Run:
    """The run as it stood when the checkpoint at `path` was written; torch's global generators too."""
    state = checkpoint.load(path, verified=True)  # by `latest`, just now
    step = state["step"]
    rundir.check_same(path, state["settings"], sae_config, config, step, total_steps)
    device = pick_device(config.device)
    sae = SAE(sae_config, device="meta")
    # Copies: what `load` returns on a CPU may be a mapping of a file that pruning deletes.
    sae.load_state_dict({name: value.clone() for name, value in load(path, device).state_dict().items()}, assign=True)
    with torch.no_grad():
        sae.b_enc.copy_(state["b_enc"])
        sae.b_dec.copy_(state["b_dec"])
    engine = make_engine(sae, config, total_steps)
    engine.load_state_dict(state["engine"])
    feed = Feed(source, config, device, sae.dtype, cursor=state["cursor"])
    feed.scale = state["scale"]
    feed.restore_ahead(state["ahead"], step)
    _set_rng(state["rng"])
    run = Run(sae, engine, feed, config, total_steps, step, state["tokens"], saved_step=step, line=state["line"])
    run.seconds_before, run.waited_before = state["seconds"], state["waited"]
    return run


def _open_folder(run: Run, folder: Path, keep: int) -> None:
    """Gives the run its folder, rid of what came after the checkpoint that it goes on from."""
    run.folder, run.keep = folder, keep
    with rundir.writing(folder):
        rundir.remove_leftovers(folder)
        checkpoint.prune(folder / rundir.CHECKPOINTS, run.step, keep)
        rundir.write_config(folder, run.sae.config, run.config)
        # The line of the last step is written at the very end, once more if need be.
        run.log = MetricsLog(folder, after=min(run.step, run.total_steps - 1))


def advance(run: Run, shown: Bar) -> bool:
    """One optimiser step, with the log line and the checkpoint due after it; False when none is left to do."""
    if run.step >= run.total_steps:
        return False
    x = run.feed.next(run.step)
    if x is None:
        _end_early(run)
        return False
    stats = _step(run, x)
    run.step += 1
    run.tokens += len(x)
    run.last = (x, stats)
    shown.advance(len(x))
    if run.step == run.total_steps:
        run.line = _line(run, x, stats)
    else:
        _report_and_save(run, x, stats, shown)
    return True


def stopped(run: Run) -> Stopped:
    """Saves a run before its end; the exception to raise."""
    _save(run)
    run.engine.finish()
    return Stopped(run.step, run.folder, fold(run.sae, run.feed.scale))


def _step(run: Run, x: Tensor) -> StepStats:
    try:
        return run.engine.step(x)
    except InputError:
        run.feed.confirm()  # where the batch itself was bad, this names its source
        raise


def _report_and_save(run: Run, x: Tensor, stats: StepStats, shown: Bar) -> None:
    """What is due after a step that is not the last. The line comes first: a checkpoint never lacks lines before it."""
    config = run.config
    evaluates = _due(run.step, config.eval_every)
    if evaluates or _due(run.step, config.log_every):
        line = _line(run, x, stats)
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


def _line(run: Run, x: Tensor, stats: StepStats) -> Line:
    """The metrics of a step with batch x. Reads the device.

    Raises:
        InputError: the batch or the loss is not finite.
    """
    run.feed.confirm()
    line = {"step": run.step, "tokens": run.tokens, "seconds": run.seconds} | _figures(run, x, stats) | run.speeds()
    if not math.isfinite(line["losses/overall_loss"]):
        raise InputError(f"loss is {line['losses/overall_loss']} at step {run.step}: training diverged; lower lr")
    return line


def _publish(run: Run, line: Line, shown: Bar) -> None:
    shown.show(line)
    if run.log is not None:
        with rundir.writing(run.log.path):
            run.log.write(line)
    if run.on_log is not None:
        run.on_log(line)
    run.mark()


def _figures(run: Run, x: Tensor, stats: StepStats) -> Line:
    """A step's figures under the names of SAELens' panels, and FVU and dead share under their own."""
    fvu, dead = float(stats.fvu), float(stats.dead_share)
    return {
        "losses/overall_loss": float(stats.loss),
        # Mean over tokens of the summed squared error of scaled inputs, whatever the loss was.
        "losses/mse_loss": fvu * float(total_variance(x)) / len(x),
        "losses/auxiliary_reconstruction_loss": float(stats.auxk_loss),
        "metrics/explained_variance": 1 - fvu,
        "metrics/l0": float(stats.l0),
        "sparsity/dead_features": round(dead * run.sae.config.n_latents),
        "details/current_learning_rate": stats.lr,
        "details/n_training_samples": run.tokens,
        "fvu": fvu,
        "dead_share": dead,
        "grad_norm": float(stats.grad_norm),
    }


@torch.no_grad()
def evaluate_heldout(sae: SAE, feed: Feed) -> Line:
    """FVU, explained variance and L0 over (at most HELDOUT_ROWS of) the held-out rows; empty where there are none.

    In mid-run the SAE is taken as it is: an engine may owe sleeping rows some updates, which only `finish` settles.
    """
    reconstruction, fired, n_rows = Reconstruction(), 0.0, 0
    for x in feed.heldout():
        x_hat, acts, _ = sae(x)
        reconstruction.update(x, x_hat)
        fired, n_rows = fired + float((acts != 0).sum()), n_rows + len(x)
        if n_rows >= HELDOUT_ROWS:
            break
    if n_rows == 0:
        return {}
    fvu = reconstruction.compute()["fvu"]
    return {"heldout/fvu": fvu, "heldout/explained_variance": 1 - fvu, "heldout/l0": fired / n_rows}


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
    state = {
        "settings": rundir.settings(run.sae.config, run.config),
        "step": run.step,
        "tokens": run.tokens,
        # The last step's figures wait here for those of the finished SAE, which are measured after the last checkpoint.
        "line": run.line,
        "seconds": run.seconds,
        "waited": run.waited_before + run.feed.waited,
        "scale": run.feed.scale,
        "cursor": run.feed.cursor,
        "ahead": run.feed.ahead,
        "rng": _get_rng(),
        # The SAE in a checkpoint serves raw inputs; its biases times the scale would not be these to the bit.
        "b_enc": run.sae.b_enc,
        "b_dec": run.sae.b_dec,
        "engine": run.engine.state_dict(),
    }
    folder = run.folder / rundir.CHECKPOINTS
    with rundir.writing(folder):
        if run.log is not None:
            run.log.sync()
        checkpoint.save(folder, run.step, fold(run.sae, run.feed.scale), state, run.keep)
    run.saved_step = run.step
    run.mark()


def finish(run: Run, shown: Bar) -> SAE:
    """The last checkpoint, the SAE in its final form and its figures; on disk too where there is a folder."""
    if run.config.save_every:
        _save(run)
    averaged = getattr(run.engine, "averaged", lambda: None)()
    run.engine.finish()
    if run.line is not None:
        _publish(run, run.line | evaluate_heldout(run.sae, run.feed), shown)
    sae = fold(run.sae, run.feed.scale)
    if run.folder is not None:
        with rundir.writing(run.folder):
            if averaged is not None:
                average = SAE(sae.config, device="meta")
                average.load_state_dict(averaged, assign=True)
                fold(average, run.feed.scale).save(run.folder / rundir.EMA)
            sae.save_weights(run.folder / WEIGHTS)
    return sae


def _get_rng() -> dict[str, Tensor]:
    """The states of torch's global generators: data and models made by the caller may draw from them."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}
    return state


def _set_rng(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in state:
                torch.cuda.set_rng_state(state[f"cuda{i}"], i)


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second is handled as it was outside, so it ends at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python takes signals in the main thread alone
        yield stop
        return
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        restore()
