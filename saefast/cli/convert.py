"""`saefast convert`: an SAE from one library's files into another's."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import tyro

from saefast.cli.args import parse
from saefast.errors import InputError
from saefast.files import usable
from saefast.formats.opening import AUTO, density, load, save
from saefast.formats.own import Own
from saefast.formats.registry import formats
from saefast.models.config import DType
from saefast.models.sae import SAE

if TYPE_CHECKING:
    # What a type checker cannot read: the names of formats.
    Read: TypeAlias = str
    Written: TypeAlias = str
else:
    _NAMES = (AUTO, *formats)
    Read = Literal[_NAMES]
    Written = Literal[tuple(name for name, one in formats.items() if one.writes)]


@dataclass
class ConvertArgs:
    """Convert an SAE from one library's files into another's.

    Keeps all that the other format has a place for, and lists the rest. GIVEN stays as it is.
    """

    given: tyro.conf.Positional[str]
    """folder or file of an SAE, or hub:owner/name/folder@revision"""
    out: tyro.conf.Positional[Path]
    """folder for the SAE, new or empty"""
    format: Written
    """what to write"""
    source_format: Read = AUTO
    """what to read, where the names of files and tensors do not tell"""
    dtype: DType | None = None
    """of the weights; None is the file's"""
    map: bool = False
    """leave matrices in the file, for SAEs larger than memory; formats that keep a latent in a row allow that"""


def main(argv: list[str]) -> int:
    args = parse(ConvertArgs, argv, "convert")
    out, given = usable(args.out), Path(args.given).expanduser()
    if given.exists() and given.resolve() == out.resolve():
        raise InputError(f"OUT is {args.out}, which is what is read: choose another folder")
    sae = load(args.given, format=args.source_format, dtype=args.dtype, map=args.map).requires_grad_(False)
    lost = save(sae, out, format=args.format, density=density(args.given, format=args.source_format))
    print(f"{args.given} is {_about(sae)}")
    for line in lost:
        print(f"  left out: {line}")
    print(f"written: {', '.join(str(file) for file in sorted(out.iterdir()) if file.is_file())}")
    if args.format == Own.name:
        print(f"next: saefast eval {shlex.quote(str(args.out))} --data ACTIVATIONS")
    return 0


def _about(sae: SAE) -> str:
    """An SAE in a few words."""
    c = sae.config
    wide = f"{c.d_in:,}" if sae.d_out == c.d_in else f"{c.d_in:,} to {sae.d_out:,}"
    return f"{c.activation}, {c.n_latents:,} latents of width {wide}, {c.dtype}"
