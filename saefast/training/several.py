"""train_many(): several SAEs trained side by side, step by step, from one pass over the data."""

import contextlib
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from saefast import ambient
from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.files import usable
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.training.api import Run, Stopped, advance, advise, finish, opened, stop_signals, stopped
from saefast.training.progress import bar
from saefast.typed import typed


class Member(NamedTuple):
    """One of several SAEs: its data (anything `train` takes), what it is and how it is trained."""

    batches: Any
    sae_config: SAEConfig
    train_config: TrainConfig


@typed
@ambient.plainly(grad=True)
def train_many(
    members: Mapping[str, Member],
    out_dir: str | Path | None = None,
    *,
    resume: bool = False,
    keep_checkpoints: int = 2,
    progress: bool | None = None,
) -> dict[str, SAE]:
    """Trains the members in turn, one step each, so that sources fed by one pass stay together.

    A member may be done before others: it has fewer tokens, or was at a plateau (`TrainConfig.stop_at_plateau`).

    Each member is a run of its own, as `train` would make it, in out_dir/NAME: its own metrics, checkpoints and SAE, to
    the bit. Ctrl-C saves all of them; resume=True goes on with each from its own newest checkpoint.

    Args:
        members: by name, which becomes a folder: slashes make subfolders.
        out_dir, resume, keep_checkpoints, progress: as for `train`. The bar shows the member that steps.

    Returns:
        The trained SAEs, by name.

    Raises:
        InputError: as `train`, naming the member; no members.
        Stopped: after Ctrl-C or SIGTERM, about the first member.
    """
    check_names(members)
    with contextlib.ExitStack() as stack:
        runs = {
            name: _enter(stack, name, member, out_dir, resume, keep_checkpoints) for name, member in members.items()
        }
        total = sum(run.total_steps * run.config.batch_size for run in runs.values())
        shown = stack.enter_context(bar(total, sum(run.tokens for run in runs.values()), progress))
        stop = stack.enter_context(stop_signals())
        advise(runs.values())
        # Live, the held-out figures of these take as many rows as they drew, which the other members are to draw too.
        finished = {name: finish(run, shown) for name, run in runs.items() if run.step >= run.total_steps}
        for name in finished:
            runs[name].feed.source.leave()
        # The member with the fewest steps goes first: after a kill, their checkpoints may be of different steps.
        while not stop.is_set() and (behind := _furthest_behind(runs)):
            run = runs[behind]
            advance(run, shown, stop)
            if run.step >= run.total_steps:
                run.feed.source.leave()
        if stop.is_set() and _furthest_behind(runs):
            raise _all_stopped(runs)
        return finished | {name: finish(run, shown) for name, run in runs.items() if name not in finished}


def check_names(names: Collection[str]) -> None:
    """Raises InputError for no names, and for names that cannot each be a folder inside the run's."""
    if odd := [name for name in names if not isinstance(name, str)]:
        raise InputError(f"members has the name {odd[0]!r}: expected text, which becomes a folder")
    places = [PurePosixPath(name) for name in names]
    if not places:
        raise InputError("members is empty: name at least one SAE to train")
    for name, place in zip(names, places, strict=True):
        if not place.parts or place.is_absolute() or ".." in place.parts or "\0" in name:
            raise InputError(f"{name!a} is no name for an SAE: it becomes a folder inside the run's own")
        if places.count(place) > 1 or any(place in other.parents for other in places):
            raise InputError(f"{name!a} is named twice, or is the folder that another SAE lies in: name each once")


def _enter(
    stack: contextlib.ExitStack,
    name: str,
    member: Member,
    out_dir: str | Path | None,
    resume: bool,
    keep_checkpoints: int,
) -> Run:
    if not isinstance(member, tuple) or len(member) != len(Member._fields):
        raise InputError(f"{name} is a {type(member).__name__}: expected Member(batches, SAEConfig, TrainConfig)")
    folder = None if out_dir is None else usable(usable(out_dir) / name)
    try:
        return stack.enter_context(opened(*member, folder, resume, keep_checkpoints, None))
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _furthest_behind(runs: Mapping[str, Run]) -> str | None:
    """The unfinished member with the fewest steps, the first of them in a tie; None when all are done."""
    unfinished = [name for name, run in runs.items() if run.step < run.total_steps]
    return min(unfinished, key=lambda name: runs[name].step, default=None)


def _all_stopped(runs: Mapping[str, Run]) -> Stopped:
    saved = [stopped(run) for run in runs.values()]
    return saved[0]
