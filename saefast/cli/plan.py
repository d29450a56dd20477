"""`saefast plan`: what a training run will need, as a table."""

from collections.abc import Sequence

from saefast.cli.args import parse
from saefast.training.plan import OPTIMIZERS, Plan, PlanArgs, largest, make_plan

# The share of the cores that others may have before the figures are doubted.
BUSY = 0.1


def main(argv: list[str]) -> int:
    print(describe(make_plan(parse(PlanArgs, argv, "plan"))))
    return 0


def describe(plan: Plan) -> str:
    """The plan as a table for a terminal."""
    args, device = plan.args, plan.device
    lines = [
        f"{args.n_latents:,} latents × {args.d_in:,}, k = {args.k}, {args.batch_size:,} tokens a step, "
        f"{args.optimizer}, on {plan.device_name} ({device.source}: {device.memory / 1e9:.0f} GB, "
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
    return "\n".join(lines + _cost(plan) + _doubt(plan))


def _verdict(plan: Plan) -> str:
    args, memory = plan.args, plan.device.memory
    sizes = [(name, largest(args, name, plan.device_name, memory)) for name in OPTIMIZERS]
    room = ", ".join(f"{size:,} latents with {name}" for name, size in sizes)
    return f"{'fits' if plan.fits else 'does not fit'}; the largest dictionary here: {room}"


def _cost(plan: Plan) -> list[str]:
    if plan.args.n_tokens is None:
        return []
    hours = plan.args.n_tokens / plan.tokens_per_second / 3600
    price = "" if plan.args.price is None else f", {hours * plan.args.price:,.2f} at {plan.args.price:g} an hour"
    return [f"{plan.args.n_tokens:,} tokens: {hours:,.2f} hours{price}"]


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
