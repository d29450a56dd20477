"""What came of a run, in a few lines: how good it is, which latents do nothing, and whether more tokens would help."""

from collections.abc import Mapping, Sequence
from typing import Any

from saefast.training.trend import Trend

Line = Mapping[str, Any]


def outcome(lines: Sequence[Line]) -> list[str]:
    """In words, from the lines of metrics.jsonl (see `read_metrics`)."""
    last = lines[-1]
    if "heldout/rows" in last:
        fvu = f"held-out FVU {_heldout_fvu(last)} on {last['heldout/rows']:,} rows"
    else:
        fvu = f"FVU {_number(last['fvu'])} on the last batch (no figures of held-out rows)"
    return [f"{fvu}, L0 {last['metrics/l0']:.1f}", silent_latents(last), *filter(None, (plateau(lines), more(last)))]


def silent_latents(last: Line) -> str:
    """Which part of the latents does nothing, over each window that there is."""
    windows = [f"{last['sparsity/silent_share']:.2%} in the last {last['sparsity/silent_tokens']:,} tokens of training"]
    windows.append(f"{last['sparsity/never_fired_share']:.2%} in all of it")
    if "heldout/silent_share" in last:
        windows.append(f"{last['heldout/silent_share']:.2%} on the held-out rows")
    return f"latents that did not fire: {', '.join(windows)}"


def more(last: Line) -> str:
    """Whether more tokens would help; nothing where the run does not tell."""
    if "heldout/fall_error" not in last:
        return ""
    return f"before the decay, held-out FVU was {Trend(last['heldout/fall_per_doubling'], last['heldout/fall_error'])}"


def plateau(lines: Sequence[Line]) -> str:
    """That a plateau ended the run; nothing where none did."""
    step = lines[-1].get("details/plateau_step")
    if step is None:
        return ""
    last, planned = lines[-1]["step"], max(line["details/total_steps"] for line in lines)
    return f"stopped at a plateau: the decay began at step {step:,} and ended at {last:,}, of {planned:,} planned"


def _heldout_fvu(last: Line) -> str:
    """Of all rows, and of ordinary ones where a few rows make that another figure."""
    all_rows, ordinary = _number(last["heldout/fvu"]), _number(last["heldout/fvu_ordinary"])
    return all_rows if ordinary == all_rows else f"{all_rows} (of ordinary rows {ordinary})"


def _number(value: float | None) -> str:
    """A figure that does not exist is null in JSON."""
    return "does not exist" if value is None else f"{value:.4f}"
