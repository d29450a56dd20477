"""`saefast finetune`: a run's SAE through its language model, so that this predicts with it as it does without."""

import dataclasses
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from saefast.analysis.evaluation import (
    LM_TOKENS,
    Evaluation,
    evaluate_run,
    harvest_of_text,
    load_finished,
    run_source,
)
from saefast.cli.args import announce_harvest, parse, watched
from saefast.data.provenance import DATA
from saefast.data.source import TARGET, X
from saefast.errors import InputError
from saefast.files import read_json, usable, write_json
from saefast.harvest.config import HarvestConfig
from saefast.harvest.harvested_model import causal_language_model, harvested_tokenizer
from saefast.harvest.text import open_texts
from saefast.models.sae import SAE, WEIGHTS
from saefast.training.finetune import RECORD, finetune
from saefast.training.finetune_config import FinetuneConfig
from saefast.training.loop import Line, Stopped

# What is reported, in this order: figures of the spliced model, then of the rows.
LM_FIGURES = ("kl_sae", "ce_clean", "ce_sae", "ce_zero", "loss_recovered")
ROW_FIGURES = ("fvu", "fvu_ordinary", "l0", "dead_share")


@dataclass
class FinetuneArgs:
    """Fine-tune a run's SAE inside the language model that its rows are from, so that the model predicts with the
    reconstruction in place of the rows as it does without.

    The model reads the training text of the run's harvest again, or --text. OUT becomes a run like RUN, for `saefast
    eval` and `saefast features`; figures before and after are of held-out text. A stopped command goes on with
    --resume. RUN stays as it is.
    """

    run: tyro.conf.Positional[Path]
    """folder of a run on a language model's activations"""
    out: tyro.conf.Positional[Path]
    """folder for the fine-tuned SAE"""
    text: tuple[str, ...] = ()
    """other text to read: files, folders, or one `datasets` name (owner/name[:config[:split]])"""
    data: str | None = None
    """the harvest, where it is not where the run says"""
    model: str | None = None
    """language model that was harvested, where it is not found by its name: a folder, or a name that loads it"""
    lm_tokens: int = LM_TOKENS
    """held-out text for the figures of the model before and after; 0 leaves them out"""
    resume: bool = False
    """go on from the newest checkpoint in OUT"""
    keep_checkpoints: int = 2
    """newest checkpoints to keep"""
    settings: FinetuneConfig = field(default_factory=FinetuneConfig)


def main(argv: list[str]) -> int:
    args = parse(FinetuneArgs, argv, "finetune")
    if args.lm_tokens < 0:
        raise InputError(f"lm_tokens is {args.lm_tokens}: expected at least 0")
    announce_harvest(args.run, args.data)
    try:
        before, after = run_finetune(args)
    except Stopped as stop:
        raise KeyboardInterrupt(f"stopped at step {stop.step}; the same command with --resume goes on") from None
    print(table(before, after))
    print(f"\nwritten: {args.out / WEIGHTS}, {args.out / RECORD}")
    print(f"next: saefast eval {shlex.quote(str(args.out))}")
    return 0


def run_finetune(args: FinetuneArgs) -> tuple[Evaluation, Evaluation]:
    """Fine-tunes as the arguments say. -> Figures before and after, on held-out rows and text."""
    run, out = usable(args.run), usable(args.out)
    sae = load_finished(run)
    source = run_source(run, sae, args.data, watched(), args.model)
    try:
        mapped, folder = harvest_of_text(source)
        model = causal_language_model(folder.index, args.model, sae.device)
    except InputError as error:
        raise InputError(f"{run} cannot be fine-tuned through a language model: {error}") from None
    _about(sae, folder.path)
    text, given = (folder, {}) if not args.text else _other_text(args, folder.index)
    figures = {"data": str(folder.path), "lm_tokens": args.lm_tokens, "model": model}
    before = evaluate_run(run, **figures, write=False)
    finetune(
        sae,
        model,
        text,
        args.settings,
        out,
        hook=mapped.hooks[X],
        target_hook=mapped.hooks.get(TARGET),
        resume=args.resume,
        keep_checkpoints=args.keep_checkpoints,
        on_log=None if watched() else _print,
        **given,
    )
    after = evaluate_run(out, **figures)
    record = read_json(out / RECORD, dict[str, Any])
    for name, result in (("before", before.to_dict()), ("after", after.to_dict())):
        record[name] = result["metrics"] | (result["lm"] or {})
    write_json(out / RECORD, record)
    return before, after


def _about(sae: SAE, folder: Path) -> None:
    """Lets the SAE's metadata say where its data is from any folder: the fine-tuned SAE lies in another."""
    recorded = sae.config.metadata.get(DATA, {}) | {"path": os.path.realpath(folder)}
    sae.config = dataclasses.replace(sae.config, metadata=sae.config.metadata | {DATA: recorded})


def _other_text(args: FinetuneArgs, index: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Text that is not the harvest's, and how it is cut: as that was."""
    known = {item.name for item in dataclasses.fields(HarvestConfig)} - {"text"}
    settings: dict[str, Any] = {name: value for name, value in index.get("settings", {}).items() if name in known}
    # JSON has lists for tuples.
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    config = HarvestConfig(**settings)
    text = open_texts(args.text, config.text_column, config.seed)
    return text, {"harvest": config, "tokenizer": harvested_tokenizer(index, None, args.model)}


def _print(line: Line) -> None:
    print(
        f"step {line['step']}/{line['details/total_steps']}  KL {line['losses/kl']:.4f}  FVU {line['fvu']:.4f}  "
        f"L0 {line['metrics/l0']:.1f}  {line['tokens_per_second']:,.0f} tokens/s",
        flush=True,
    )


def table(before: Evaluation, after: Evaluation) -> str:
    """The figures before and after, one a line, and by how much each changed."""
    lines = [f"{after.about['heldout_rows']:,} held-out rows of {after.about['data']}", _row("", "before", "after", "")]
    for names, old, new in ((LM_FIGURES, before.lm, after.lm), (ROW_FIGURES, before.metrics, after.metrics)):
        for name in names:
            if name in old and name in new:
                shown = ["none" if math.isnan(value) else f"{value:.5g}" for value in (old[name], new[name])]
                change = f"{new[name] / old[name] - 1:+.1%}" if old[name] and "none" not in shown else ""
                lines.append(_row(name, *shown, change))
    if not after.lm:
        lines.append(f"figures of the language model left out: {after.lm_left_out}")
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"  {cells[0]:<16}" + "".join(f"{cell:>13}" for cell in cells[1:])
