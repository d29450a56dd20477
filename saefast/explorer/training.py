"""The view of a run's training: its curves, live while it trains, and what `saefast eval` found.

The script asks again and again and is told only what is new: see `Curves`.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from saefast.explorer.curves import Curves, Read, finite, numbers, thinned
from saefast.explorer.state import Explorer, as_json

EVALUATION = "eval.json"


class Curve(NamedTuple):
    """name: in metrics.jsonl. few: it has a value in few lines, so that each is marked."""

    name: str
    label: str
    few: bool = False


class Chart(NamedTuple):
    """unit: of the values; "%" for shares of 1. log: it begins with a logarithmic axis. zero: its axis has 0."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    log: bool = False
    zero: bool = False


CHARTS = (
    Chart(
        "Fraction of variance unexplained",
        "FVU",
        (
            Curve("fvu", "training batches"),
            Curve("heldout/fvu", "held-out rows", few=True),
            Curve("heldout/fvu_ordinary", "held-out, ordinary rows", few=True),
        ),
        log=True,
    ),
    Chart(
        "Loss",
        "loss of a batch",
        (
            Curve("losses/overall_loss", "all of it"),
            Curve("losses/auxiliary_reconstruction_loss", "AuxK"),
            Curve("losses/sparsity_loss", "sparsity"),
            Curve("losses/kl", "KL of the model's outputs"),
        ),
        log=True,
    ),
    Chart(
        "Latents that do not fire",
        "%",
        (
            Curve("sparsity/silent_share", "silent of late"),
            Curve("sparsity/never_fired_share", "never fired"),
            Curve("dead_share", "dead"),
            Curve("heldout/silent_share", "silent on held-out rows", few=True),
        ),
        zero=True,
    ),
    Chart(
        "L0",
        "latents on per token",
        (Curve("metrics/l0", "training batches"), Curve("heldout/l0", "held-out rows", few=True)),
    ),
    Chart("Learning rate", "", (Curve("details/current_learning_rate", "learning rate"),), zero=True),
    Chart("Gradient norm", "norm over all weights", (Curve("grad_norm", "gradient norm"),), log=True),
    Chart("Speed", "tokens a second", (Curve("tokens_per_second", "tokens a second"),), zero=True),
    Chart("Waiting for data", "%", (Curve("idle_share", "share of the time"),), zero=True),
)
# Besides the curves, how many rows a held-out figure is of: points are joined only where these are the same.
NAMES = (*(curve.name for chart in CHARTS for curve in chart.curves), "heldout/rows")

# Figures of eval.json that are shown, and whether they are shares.
FIGURES = (
    ("fvu", "FVU", False),
    ("fvu_ordinary", "FVU, ordinary rows", False),
    ("explained_variance", "explained variance", False),
    ("l0", "L0", False),
    ("cosine", "cosine of x and its reconstruction", False),
    ("l2_ratio", "length of the reconstruction / of x", False),
    ("dead_share", "latents that fire on no row", True),
    ("dense_share_1pct", "latents on more than 1 % of rows", True),
    ("ce_clean", "cross-entropy of the model, nats", False),
    ("ce_sae", "the same with the reconstruction", False),
    ("loss_recovered", "loss recovered, 1 is all", False),
    ("kl_sae", "KL from the model, nats", False),
)

# A run that wrote so lately is taken to go on, in seconds; longer where its lines come more seldom.
RECENT = 20


class Figure(NamedTuple):
    """A held-out figure: value None where it is no finite number."""

    label: str
    value: float | None
    share: bool
    formula: str


class Evaluation(NamedTuple):
    """What is shown of eval.json. why: why nothing is, in a sentence."""

    figures: list[Figure]
    rows: int | None = None
    why: str = ""


def routes(explorer: Explorer) -> list[BaseRoute]:
    curves = Curves(explorer.run, NAMES)

    # Not async: files are read in a thread of their own, and nobody else waits.
    def page(request: Request) -> Response:
        return explorer.page(request, "training.html", charts=CHARTS, evaluation=evaluation(explorer.run))

    def data(request: Request) -> Response:
        generation, since = (_whole(request.query_params.get(name)) for name in ("generation", "since"))
        read = curves.read(generation, since)
        return as_json(answer(read, state(explorer.run, read)))

    return [Route("/training", page), Route("/training/data", data)]


def answer(read: Read, state: dict[str, Any]) -> dict[str, Any]:
    """What the script is told: curves as two lists each, thinned, and how the run does."""
    curves = {}
    for name in NAMES:
        xs, ys = thinned(*read.curves[name])
        if len(xs):
            curves[name] = [numbers(xs, 12), numbers(ys)]
    return {
        "generation": read.generation,
        "since": read.since,
        "lines": read.lines,
        "unreadable": read.unreadable,
        "state": state,
        "curves": curves,
    }


def state(run: Path, read: Read, now: float | None = None) -> dict[str, Any]:
    """How far a run is, and whether it goes on.

    is: "live", "finished" (all its steps are done), "stopped" (there are steps to do, and nobody does them), or "none"
    where it has written no figures.
    """
    last = read.last
    found: dict[str, Any] = {"is": "none", "step": None, "steps": None, "tokens": None, "all_tokens": None}
    found |= {"seconds": None, "seconds_left": None, "seconds_ago": None}
    held = is_held(run)
    if not last:
        return found | {"is": "live" if held else "none"}
    step, tokens, steps = last["step"], last["tokens"], last.get("details/total_steps")
    done = steps is not None and step >= steps
    ago = max((time.time() if now is None else now) - read.written, 0)
    live = held or (not done and ago < max(RECENT, 3 * read.interval))
    found |= {"is": "live" if live else "finished" if done else "stopped", "step": step, "tokens": tokens}
    found |= {"seconds": last.get("seconds"), "seconds_ago": round(ago, 1)}
    if steps is not None and step > 0:
        left = max(steps - step, 0)
        seconds_left = left * last["seconds"] / step if "seconds" in last else None
        found |= {"steps": steps, "all_tokens": tokens * max(steps / step, 1), "seconds_left": seconds_left}
    return {name: value if isinstance(value, str) else finite(value) for name, value in found.items()}


def is_held(run: Path) -> bool:
    """Whether a process trains into a folder, by the lock that it holds on it; False where the system does not say.

    The lock is looked for, not tried: a run that begins at that moment would be refused.
    """
    try:
        number = os.stat(run).st_ino
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except (OSError, ValueError):
        return False
    # "1: FLOCK  ADVISORY  WRITE 20404 fe:00:2441598 0 EOF"
    fields = [line.split() for line in locks.splitlines()]
    return any("FLOCK" in f and "WRITE" in f and any(part.endswith(f":{number}") for part in f) for f in fields)


def evaluation(run: Path) -> Evaluation:
    """The held-out figures of a run's eval.json."""
    path = run / EVALUATION
    if not path.is_file():
        return Evaluation([], why=f"There is no {EVALUATION} yet: saefast eval {run} makes it.")
    try:
        found = json.loads(path.read_bytes())
        metrics = {**found["metrics"], **(found.get("lm") or {})}
        formulas, rows = found.get("formulas") or {}, found["about"].get("heldout_rows")
        figures = [
            Figure(label, finite(metrics[name]), share, _formula(formulas, name))
            for name, label, share in FIGURES
            if name in metrics
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Evaluation([], why=f"{path} cannot be read: saefast eval {run} makes it anew.")
    return Evaluation(figures, rows if isinstance(rows, int) else None)


def _formula(formulas: dict[str, Any], name: str) -> str:
    """A figure's formula and where it is from, as eval.json states them."""
    stated = formulas.get(name, {})
    return "; ".join(str(stated[part]) for part in ("formula", "source") if part in stated)


def _whole(text: str | None) -> int:
    """A whole number of the query; -1, which is never one of ours, for anything else."""
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 16 else -1
