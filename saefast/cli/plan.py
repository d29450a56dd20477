"""`saefast plan`: what a training run will need, as a table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from saefast.cli.args import parse
from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.training.plan import OPTIMIZERS, Plan, largest, make_plan

# The share of the cores that others may have before the figures are doubted.
BUSY = 0.1


@dataclass
class PlanArgs:
    """Calculate memory, time and cost of a training run before it starts.

    Takes the settings of `saefast train`. Sizes, k, optimizer and settle_every count; the others change nothing here.
    """

    d_in: int = 768
    """width of the activations"""
    n_latents: int = 32768
    """dictionary size"""
    device: str = "auto"
    """b200, h200, h100, a100, l40s, l4, rtx4090, or cpu (this machine's, measured); auto: its GPU, else its CPU"""
    price: float | None = None
    """of an hour of the device, in your currency"""
    sae: partial[SAEConfig] = field(default_factory=lambda: partial(SAEConfig))
    """What the SAE is."""
    train: TrainConfig = field(default_factory=TrainConfig)


def main(argv: list[str]) -> int:
    args = parse(PlanArgs, argv, "plan")
    if args.price is not None and not args.price >= 0:
        raise InputError(f"price is {args.price}: expected at least 0")
    plan = make_plan(args.sae(d_in=args.d_in, n_latents=args.n_latents), args.train, args.device)
    print(describe(plan, args.train.n_tokens, args.price))
    return 0


def describe(plan: Plan, n_tokens: int | None = None, price: float | None = None) -> str:
    """The plan as a table for a terminal; with n_tokens, the hours they take, and at a price an hour, their cost."""
    sizes, device = plan.sizes, plan.device
    lines = [
        f"{sizes.n_latents:,} latents × {sizes.d_in:,}, k = {sizes.k}, {sizes.batch_size:,} tokens a step, "
        f"{sizes.optimizer}, on {plan.device_name} ({device.source}: {device.memory / 1e9:.0f} GB, "
        f"{device.flops / 1e12:.3g} TFLOP/s, {device.bandwidth / 1e9:,.0f} GB/s)",
        "",
        *_table([(name, _size(size)) for name, size in plan.memory.items()] + [("memory", _size(plan.total_bytes))]),
        "",
        *_table(
            [("stage", "GFLOP", "traffic", "ms")]
            + [(s.name, f"{s.flops / 1e9:,.1f}", _size(s.traffic), f"{s.seconds * 1e3:,.3f}") for s in plan.stages]
            + [("step", "", "", f"{plan.seconds * 1e3:,.3f}")]
        ),
        "",
        f"{plan.tokens_per_second:,.0f} tokens/s, calculated",
        _verdict(plan),
    ]
    return "\n".join(lines + _cost(plan, n_tokens, price) + _doubt(plan))


def _verdict(plan: Plan) -> str:
    most = [(name, largest(plan.sizes, name, plan.device_name, plan.device.memory)) for name in OPTIMIZERS]
    room = ", ".join(f"{size:,} latents with {name}" for name, size in most)
    return f"{'fits' if plan.fits else 'does not fit'}; the largest dictionary here: {room}"


def _cost(plan: Plan, n_tokens: int | None, price: float | None) -> list[str]:
    if n_tokens is None:
        return []
    hours = n_tokens / plan.tokens_per_second / 3600
    cost = "" if price is None else f", {hours * price:,.2f} at {price:g} an hour"
    return [f"{n_tokens:,} tokens: {hours:,.2f} hours{cost}"]


def _doubt(plan: Plan) -> list[str]:
    busy = plan.device.busy
    if busy < BUSY:
        return []
    return [f"other processes had {busy:.0%} of this machine's cores while it was measured: idle, it is faster"]


def _size(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines
