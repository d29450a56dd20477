"""`saefast eval`: how good a run's SAE is, on rows it was never trained on."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from saefast.analysis.evaluation import EVAL, LM_TOKENS, TOGETHER, Evaluation, evaluate_run
from saefast.analysis.report import draw_run
from saefast.cli.args import announce_harvest, named, parse, watched
from saefast.cli.outcome import silent_latents
from saefast.errors import InputError
from saefast.metrics.language_model import LM_METRICS
from saefast.metrics.streaming import METRICS, Metric
from saefast.training.progress import SILENT


@dataclass
class EvalArgs:
    """Evaluate a run on its held-out rows.

    Prints a table, and leaves eval.json, latents.safetensors and pictures of training and firing densities in the
    run's folder. Where the data was harvested from a language model, its loss with the SAE spliced in is measured too.
    """

    run: tyro.conf.Positional[Path]
    """folder of a run"""
    data: str | None = None
    """evaluate on the held-out rows of this folder or file instead of the run's own"""
    lm_tokens: int = LM_TOKENS
    """held-out text the language model reads; 0 leaves it out"""
    model: str | None = None
    """language model that was harvested, where it is not found by its name: a folder, or a name that loads it"""
    max_norm_multiple: float | Literal["auto"] | None = "auto"
    """ordinary rows lie up to this many times the median distance from the centre; auto is 5, if few are beyond"""
    batch_size: int = 2048
    """rows per batch (explained_variance_legacy depends on it)"""


def main(argv: list[str]) -> int:
    args = parse(EvalArgs, argv, "eval")
    if args.batch_size < 1 or args.lm_tokens < 0:
        raise InputError(f"batch_size is {args.batch_size}, lm_tokens {args.lm_tokens}: expected >= 1 and >= 0")
    announce_harvest(args.run, args.data)
    result = evaluate_run(
        args.run,
        args.data,
        batch_size=args.batch_size,
        lm_tokens=args.lm_tokens,
        max_norm_multiple=args.max_norm_multiple,
        progress=watched(),
        model=args.model,
    )
    print(table(result))
    print(f"\nwritten: {named([args.run / EVAL], lambda: draw_run(args.run, result))}")
    print(f"next: saefast features {shlex.quote(str(args.run))}")
    return 0


def table(result: Evaluation) -> str:
    """The figures, each with its formula and source."""
    about = result.about
    lines = [f"{about['sae']} on {about['heldout_rows']:,} held-out rows of {about['data']}", *_maps(about)]
    lines += [*_far(about), ""]
    lines += _rows(result.metrics, METRICS)
    if result.parts is not None:
        lines += ["", *_parts(result.parts.compute(), about)]
    if result.together:
        lines += ["", "with the SAEs that it is the residual of", *_rows(result.together, TOGETHER)]
    if set(SILENT) <= about.get("training", {}).keys():
        lines += ["", silent_latents(about["training"])]
    if result.lm:
        lines += ["", f"spliced into {about['model']}", *_rows(result.lm, LM_METRICS, result.lm_missing)]
    else:
        lines += ["", f"language-model loss left out: {result.lm_left_out}"]
    return "\n".join(lines)


def _maps(about: dict[str, Any]) -> list[str]:
    """A line about what a transcoder maps to what."""
    if "maps" not in about:
        return []
    given, target = about["maps"]["x"], about["maps"]["target"]
    return [f"it maps {given} to {target}: in the formulas below x is {target}"]


def _far(about: dict[str, Any]) -> list[str]:
    """A line about rows that are not ordinary, where there are any."""
    n, multiple = about["ordinary"]["far"], about["ordinary"]["max_norm_multiple"]
    if not n:
        return []
    far = f"{n:,} rows lie beyond {multiple:g} times the median distance from the centre"
    return [f"{far}: fvu_ordinary is without them"]


def _parts(found: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """What there is to say of each of several layers or models."""
    names = about.get("parts") or [f"part {number}" for number in range(1, len(found["parts"]) + 1)]
    wide = max(map(len, names))
    shares = ", and its share of the latents' decoder norms" if "span" in found else ""
    lines = [f"layers or models, scaled alike: fvu of each{shares}"]
    for name, part in zip(names, found["parts"], strict=True):
        share = f"  {part['norm_share']:>6.1%}" if shares else ""
        lines.append(f"  {name:<{wide}}  {part['fvu']:>10.5g}{share}")
    if "span" in found:
        lines.append(f"  a latent is in {found['span']:.2f} of {len(names)} on average")
    if (latents := found.get("latents")) is not None:
        first, second = names
        lines.append(
            f"  latents: {latents['only_first']:,} of {first} alone, {latents['shared']:,} shared, "
            f"{latents['only_second']:,} of {second} alone, {latents['between']:,} between (by relative norm)"
        )
        lines += [_doubt(latents, which, name) for which, name in (("only_first", first), ("only_second", second))]
    return [line for line in lines if line]


def _doubt(latents: dict[str, Any], which: str, name: str) -> str:
    """Whether latents of one alone are so in truth; "" where there are none, or it is not known."""
    if f"{which}_nu_error" not in latents:
        return ""
    error, reconstruction = latents[f"{which}_nu_error"], latents[f"{which}_nu_reconstruction"]
    return (
        f"  of {name} alone: median ν of the error {error:.2f}, of the reconstruction {reconstruction:.2f} (0 is alone)"
    )


def _rows(values: dict[str, float], formulas: dict[str, Metric], missing: Mapping[str, str] | None = None) -> list[str]:
    wide, missing = max(map(len, formulas)), missing or {}
    return [
        f"  {name:<{wide}}  {'none' if name in missing else format(value, '.5g'):>10}  "
        + missing.get(name, f"{formulas[name].formula}  [{formulas[name].source}]")
        for name, value in values.items()
    ]
