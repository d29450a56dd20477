"""train(): from batches to a trained SAE, with metrics, checkpoints, resume and a clean stop."""

import contextlib
import dataclasses
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from saefast import ambient
from saefast.data.opening import HELDOUT, are_folders, open_source
from saefast.data.provenance import describe_data
from saefast.data.shuffled_iterable import SHUFFLE_ROWS
from saefast.data.source import Source
from saefast.engines.autograd import AutogradEngine
from saefast.engines.config import TrainConfig
from saefast.engines.engine import Engine
from saefast.engines.fused import FusedEngine
from saefast.engines.recipe import Recipe, as_begun, choose
from saefast.errors import InputError
from saefast.files import usable
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, load
from saefast.placement import pick_device
from saefast.training import checkpoint, run_folder
from saefast.training.feed import Feed
from saefast.training.heldout import check_heldout
from saefast.training.limits import check_sizes
from saefast.training.loop import Line, Run, RunState, Stopped, advance, advise, finish, resume_schedule, stopped
from saefast.training.progress import MetricsLog, bar
from saefast.typed import typed

__all__ = ["Run", "Stopped", "advance", "advise", "finish", "opened", "stop_signals", "stopped", "train"]


@typed
@ambient.plainly(grad=True)
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
    hooks: Mapping[str, str] | None = None,
) -> SAE:
    """Trains a sparse autoencoder.

    Inputs are scaled by one number s first, as `TrainConfig.normalize` says, estimated on the first rows and then
    fixed. The SAE returned and every SAE saved serve raw inputs: TopK and ReLU commute with a positive factor, so
    dividing b_enc and b_dec by s (and thresholds, where there are any) and leaving W_enc and W_dec alone gives
    TopK(W_enc (x - b_dec/s) + b_enc/s) = acts(s·x) / s, and a reconstruction of x rather than of s·x.

    With out_dir, the run's folder (see saefast.training.run_folder) gets config.json, metrics.jsonl, checkpoints, and
    at the end sae.safetensors. A run that was killed at any moment goes on with resume=True, bit for bit as if nothing
    had happened (same device and machine); where there is no checkpoint yet, it starts at the beginning.

    Ctrl-C or SIGTERM ends the run after the step that is under way, with a checkpoint; a second one ends it at once.

    Args:
        batches: a shard folder, a .npy, .pt or .safetensors file, an array, an iterable of (B, d_in) tensors, a
            function that returns one, or a `Source`. Rows are shuffled (of an iterable through a reservoir;
            `open_source(batches, shuffle_rows=0)` leaves them in their order). See
            `saefast.data.opening.open_source`. A Source that is passed in stays open: close() it.
        sae_config: what to train.
        train_config: how; the defaults are the preset "saefast". What it leaves open is chosen from the sizes and the
            tokens (`saefast.engines.recipe.choose`); a resumed run keeps what was chosen at its beginning.
        out_dir: the run's folder, or None to keep nothing on disk.
        resume: go on from the newest checkpoint in out_dir.
        keep_checkpoints: how many checkpoints to keep.
        progress: show a bar on stderr; None is only in a terminal.
        on_log: called with every line of metrics.
        hooks: of a shard folder: {"x": hook that is encoded, "target": hook that is reconstructed}. Other data says by
            itself what is what: a mapping of arrays, an iterable of mappings.

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
    folder = None if out_dir is None else usable(out_dir)
    if resume and folder is None:
        raise InputError("resume is True but out_dir is None: give the folder of the run to go on with")
    with (
        opened(batches, sae_config, config, folder, resume, keep_checkpoints, on_log, hooks) as run,
        bar(run.total_steps * run.config.batch_size, run.tokens, progress) as shown,
        stop_signals() as stop,
    ):
        advise([run])
        while not stop.is_set() and advance(run, shown, stop):
            pass
        if run.step < run.total_steps:
            raise stopped(run)
        return finish(run, shown)


@contextlib.contextmanager
def opened(
    batches: Any,
    sae_config: SAEConfig,
    config: TrainConfig,
    folder: Path | None,
    resume: bool,
    keep_checkpoints: int,
    on_log: Callable[[Line], None] | None,
    hooks: Mapping[str, str] | None = None,
) -> Iterator[Run]:
    """A run ready for its next step, new or resumed; its folder is locked until the block ends. See `train`."""
    with contextlib.ExitStack() as stack:
        if folder is not None:
            stack.enter_context(run_folder.locked(folder))
            run_folder.check_ours(folder)
            if not resume:
                run_folder.check_new(folder)
            stack.enter_context(run_folder.nothing_begun(folder))
        if config.optimizer == "adam-lean":
            # What it trains; in float32 a huge dictionary would begin with more memory than it trains in.
            sae_config = dataclasses.replace(sae_config, dtype="bfloat16")
        # No more rows are mixed than are trained on: they may be costly to make.
        shuffle_rows = SHUFFLE_ROWS if config.n_tokens is None else min(SHUFFLE_ROWS, config.n_tokens)
        source = open_source(batches, d_in=sae_config.d_in, hooks=hooks, shuffle_rows=shuffle_rows)
        if source is not batches:
            stack.callback(source.close)
        if folder is not None and (isinstance(batches, str | Path) or are_folders(batches)):
            paths = [Path(path) for path in ((batches,) if isinstance(batches, str | Path) else batches)]
            origin = describe_data(paths, folder, source, hook=None, key=None, heldout=HELDOUT, hooks=hooks)
            sae_config = dataclasses.replace(sae_config, metadata=sae_config.metadata | origin)
        run = _begin(source, sae_config, config, folder if resume else None)
        run.on_log = on_log
        if folder is not None:
            _open_folder(run, folder, keep_checkpoints)
            stack.callback(run.close)
        yield run


def make_engine(sae: SAE, config: Recipe, total_steps: int) -> Engine:
    """The engine that config.engine names."""
    kind = AutogradEngine if config.engine == "autograd" else FusedEngine
    return kind(sae, config, total_steps)


def _begin(source: Source, sae_config: SAEConfig, config: TrainConfig, resume_from: Path | None) -> Run:
    """A new run, or the one whose newest checkpoint lies in the folder `resume_from`."""
    if resume_from is not None:
        found = checkpoint.newest(resume_from / run_folder.CHECKPOINTS, RunState)
        if found is not None:
            kept = as_begun(config, found[1]["settings"][run_folder.TRAIN])
            return _restore(*found, source, sae_config, choose(sae_config, kept, source.n_rows))
        warnings.warn(f"{resume_from} holds no checkpoint: starting from the beginning", RuntimeWarning, stacklevel=3)
    recipe = choose(sae_config, config, source.n_rows)
    device, total_steps = pick_device(recipe.device), recipe.steps
    check_sizes(sae_config, recipe, device)
    sae = SAE(sae_config, seed=recipe.seed, device=device)
    engine = make_engine(sae, recipe, total_steps)
    feed = Feed(source, recipe, device, sae.dtype)
    _check_target(feed, sae_config)
    # A run looks at no more rows than it trains on.
    first = feed.look_ahead(min(recipe.init_rows, total_steps * recipe.batch_size))
    architecture = sae.architecture
    first = feed.fit_levels(first, recipe.normalize, architecture.parts(), architecture.target_parts())
    # An SAE that normalises every token by itself takes rows of any scale, and is to be served them as they are.
    feed.fit_scales(first, recipe.normalize if architecture.row_norm(first.x) is None else "none")
    engine.initialise(*feed.scaled(feed.look_at(first)))
    check_heldout(feed)
    return Run(sae, engine, feed, recipe, total_steps)


def _restore(path: Path, state: dict[str, Any], source: Source, sae_config: SAEConfig, config: Recipe) -> Run:
    """The run as it stood when the checkpoint at `path`, which holds `state`, was written; torch's generators too."""
    step, total_steps = state["step"], config.steps
    run_folder.check_same(path, state["settings"], sae_config, config, step, total_steps)
    device = pick_device(config.device)
    sae = SAE(sae_config, device="meta")
    # Copies: what `load` returns on a CPU may be a mapping of a file that pruning deletes.
    stored = load(path, device, verify=False).state_dict()  # `checkpoint` has just looked at every byte
    sae.load_state_dict({name: value.clone() for name, value in stored.items()}, assign=True)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            if name in state["scaled"]:
                tensor.copy_(state["scaled"][name])
    engine = make_engine(sae, config, total_steps)
    try:
        engine.load_state_dict(state["engine"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} does not fit this version of saefast ({error!r}): train again elsewhere") from error
    feed = Feed(source, config, device, sae.dtype, cursor=state["cursor"])
    feed.scale, feed.target_scale = state["scale"], state["target_scale"]
    feed.levels = {name: levels.to(device) for name, levels in state.get("levels", {}).items()}
    feed.left_out.load_state_dict(state["left_out"], device)
    feed.restore_ahead(state["ahead"], step)
    _set_rng(state["rng"])
    run = Run(sae, engine, feed, config, total_steps, step, state["tokens"], saved_step=step, line=state["line"])
    run.seconds_before, run.waited_before = state["seconds"], state["waited"]
    resume_schedule(run, state)
    return run


def _check_target(feed: Feed, sae_config: SAEConfig) -> None:
    """Raises InputError where a target that is not x cannot be what this SAE gives out."""
    architecture = sae_config.architecture()
    if not feed.has_target:
        if architecture.has_target:
            raise InputError(
                f"{feed.source.source_name} has no target besides x, which a transcoder (d_out = {sae_config.d_out}, "
                f"skip = {sae_config.skip}) reconstructs: name one with hooks={{'x': ..., 'target': ...}} or "
                "--transcode, or leave d_out and skip out"
            )
        return
    found, wanted = feed.source.widths["target"], architecture.shapes()["b_dec"][-1]
    if found != wanted:
        given = f"d_out is {wanted}" if architecture.has_target else f"d_in is {wanted}, and so wide an SAE's output is"
        raise InputError(f"target is {found} wide, {given}: set d_out = {found}")
    if sae_config.apply_b_dec_to_input:
        raise InputError(
            f"{feed.source.source_name} has a target besides x, and apply_b_dec_to_input is True: set it to False, for "
            "b_dec is the centre of targets then"
        )


def _set_rng(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in state:
                torch.cuda.set_rng_state(state[f"cuda{i}"], i)


def _open_folder(run: Run, folder: Path, keep: int) -> None:
    """Gives the run its folder, rid of what came after the checkpoint that it goes on from."""
    run.folder, run.keep = folder, keep
    with run_folder.writing(folder):
        run_folder.remove_leftovers(folder)
        checkpoint.prune(folder / run_folder.CHECKPOINTS, run.step, keep)
        run_folder.write_config(folder, run.sae.config, run.config)
        # The line of the last step is written at the very end, once more if need be.
        run.log = MetricsLog(folder, after=min(run.step, run.total_steps - 1))


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
