"""`saefast calibrate`: a run's SAE with thresholds instead of a choice among latents."""

import dataclasses
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from saefast.analysis.evaluation import load_finished, run_source
from saefast.cli.args import announce_harvest, parse, watched
from saefast.data.provenance import DATA
from saefast.data.source import TARGET, Source, X
from saefast.errors import InputError
from saefast.files import usable
from saefast.models.calibration import Served, as_jumprelu, served
from saefast.models.sae import SAE, WEIGHTS

_BATCH = 2048


@dataclass
class CalibrateArgs:
    """Save a run's SAE as a JumpReLU: with thresholds, calibrated on data, instead of a choice among a token's latents.

    Half of the held-out rows that are read calibrate, so that k latents are active on average; the other half says
    what L0 and FVU were before and are now. OUT is a folder for `saefast eval`. RUN stays as it is.
    """

    run: tyro.conf.Positional[Path]
    """folder of a run whose latents compete: topk, batchtopk or groupmax, with --matryoshka or without"""
    out: tyro.conf.Positional[Path]
    """folder for the SAE"""
    per_latent: bool = False
    """each latent gets a threshold of its own, met as often as the latent was chosen; otherwise there is one for all"""
    rows: int = 16384
    """rows that calibrate, at most, and as many again that are measured"""
    data: str | None = None
    """calibrate on the held-out rows of this folder or file instead of the run's own"""
    model: str | None = None
    """language model that was harvested, where a live run has to read its text again and it is not found by its name"""


def main(argv: list[str]) -> int:
    args = parse(CalibrateArgs, argv, "calibrate")
    if not 1 <= args.rows < 2**31:
        raise InputError(f"rows is {args.rows}: expected at least 1, and less than 2^31")
    run, out = usable(args.run), usable(args.out)
    if run.resolve() == out.resolve():
        raise InputError(f"OUT is {args.out}, the run itself, whose SAE would be lost: choose another folder")
    announce_harvest(args.run, args.data)
    sae = load_finished(run)
    source = run_source(run, sae, args.data, watched(), args.model)
    (x, target), (other, other_target) = _halves(source, sae, args.rows)
    found = as_jumprelu(sae, x, target, per_latent=args.per_latent)
    _about(found.sae, run)
    found.sae.save(out)
    print(f"calibrated on {len(x):,} held-out rows of {source.source_name}, measured on {len(other):,} others")
    print(table(served(sae, other, other_target), served(found.sae, other, other_target)))
    print(f"\nwritten: {out / WEIGHTS}")
    print(f"next: saefast eval {shlex.quote(str(args.out))}")
    return 0


def _halves(source: Source, sae: SAE, n: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Two times at most n held-out rows, every other one, and what they are to be mapped to."""
    parts: list[tuple[Tensor, Tensor]] = []
    for batch in source.heldout(_BATCH, dtype=sae.dtype):
        parts.append((batch[X].to(sae.device), batch.get(TARGET, batch[X]).to(sae.device)))
        if sum(len(x) for x, _ in parts) >= 2 * n:
            break
    if sum(len(x) for x, _ in parts) < 2:
        raise InputError(f"{source.source_name} holds nothing out: harvest with a heldout share, or pass other data")
    x, target = (torch.cat(tensors)[: 2 * n] for tensors in zip(*parts, strict=True))
    return (x[::2], target[::2]), (x[1::2], target[1::2])


def _about(sae: SAE, run: Path) -> None:
    """Lets the SAE's metadata say where its data is from any folder: it is saved in another than the run's."""
    metadata: dict[str, Any] = dict(sae.config.metadata)
    if "path" in (recorded := metadata.get(DATA, {})):
        metadata[DATA] = recorded | {"path": os.path.realpath(run / recorded["path"])}
    sae.config = dataclasses.replace(sae.config, metadata=metadata)


def table(before: Served, after: Served) -> str:
    """L0 and FVU before and after, one a line."""
    lines = [f"  {'':<6}{'before':>10}{'after':>10}"]
    for name, old, new in zip(Served._fields, before, after, strict=True):
        lines.append(f"  {name:<6}{old:>10.4g}{new:>10.4g}{f'{new / old - 1:+.1%}' if old else '':>10}")
    return "\n".join(lines)
