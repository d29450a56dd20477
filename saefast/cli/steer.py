"""`saefast steer`: what a language model writes with some latents of an SAE set to other activations, beside what it
writes without."""

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from saefast.cli.args import parse
from saefast.errors import InputError
from saefast.formats.opening import load
from saefast.harvest import language_models as models
from saefast.integrations.passes import Pass
from saefast.integrations.sites import Site, at_sites, find_sites
from saefast.integrations.steering import Mode, Steering, Unit, steer
from saefast.models.config import DTYPES, DType
from saefast.placement import pick_device
from saefast.schema import Seed, check_argument

NARROWEST = 40


@dataclass
class SteerArgs:
    """Print what a causal language model writes after a prompt, with and without some latents of an SAE set.

    Every token that the model reads is steered, its own among them; what the SAE does not reconstruct is kept. How far
    that goes from what the model has seen is said above: a change as long as the activations themselves makes most
    models babble, whatever the latent.
    """

    model: tyro.conf.Positional[str]
    """causal language model: a folder, or a name that loads it (smollm2-135m-instruct is in a package of PyPI)"""
    sae: tyro.conf.Positional[str]
    """folder of a run or SAE, of any format that `saefast convert` reads, or hub:owner/name/folder"""
    set: tuple[str, ...] = ()
    """latents and what their activations are to be: 8249=100, several with a space between; for ablate the ids alone"""
    prompt: tuple[str, ...] = ()
    """texts to go on from, each in quotes"""
    mode: Mode = "clamp"
    """what an activation f becomes: the value, f + value (add), 0 (ablate), or f · value (scale)"""
    unit: Unit = "abs"
    """of values: activations, or the latent's largest activation that `saefast eval` or `features` saw (max)"""
    error_term: bool = True
    """keep what the SAE does not reconstruct"""
    positions: Literal["all", "prompt", "generated"] = "all"
    """tokens to steer"""
    hook: str | None = None
    """module whose activations the SAE takes, where its metadata does not say; see docs/hooks.md"""
    new_tokens: int = 40
    """tokens to write, at most"""
    temperature: float = 0.0
    """0 writes the likeliest token each time; more draws them"""
    seed: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """of the drawing, the same with and without"""
    dtype: DType = "float32"
    """of the model's weights"""
    device: str = "auto"
    """where both are: cpu, cuda, cuda:1 ...; auto is the GPU if there is one"""
    width: int | None = None
    """columns of the page; default the terminal's"""


def main(argv: list[str]) -> int:
    args = parse(SteerArgs, argv, "steer")
    latents = _latents(args.set, args.mode)
    _check(args)
    device = pick_device(args.device)
    sae = load(args.sae, device).requires_grad_(False)
    asked: dict[str, Any] = dict(mode=args.mode, unit=args.unit, error_term=args.error_term)
    if args.unit == "max":
        asked["max_acts"] = args.sae
    # Latents that the SAE has not are told before a model is loaded.
    steering = Steering(sae, latents, **asked)
    model, tokenizer = _model(args, device)
    skip = tokenizer.all_special_ids if sae.config.metadata.get("exclude_special_tokens") else ()
    page = args.width or shutil.get_terminal_size().columns
    for prompt in args.prompt:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
        if not ids.numel():
            raise InputError(f"prompt is {prompt!a}, no token to this tokenizer: expected some text")
        print("\n".join(_about(model, sae, steering, ids, args.hook)))
        before = _written(model, tokenizer, ids, args)
        with steer(model, sae, latents, positions=args.positions, skip_ids=skip, hook=args.hook, **asked):
            after = _written(model, tokenizer, ids, args)
        print("\n".join(side_by_side(("before", before), ("steered", after), page)), end="\n\n")
    return 0


def _latents(given: Sequence[str], mode: Mode) -> Any:
    """{latent: value}, or ids for mode "ablate"."""
    if not given:
        raise InputError("--set is missing: say which latents are to be what, as in --set 8249=100")
    found: dict[int, float] = {}
    for one in given:
        latent, sign, value = one.partition("=")
        try:
            number, wanted = int(latent), float(value) if sign else 0.0
        except ValueError:
            raise InputError(f"--set {one}: expected LATENT=VALUE, two numbers, as in 8249=100") from None
        if not sign and mode != "ablate":
            raise InputError(f"--set {one} gives latent {number} no value: expected {number}=VALUE, or --mode ablate")
        if number in found:
            raise InputError(f"--set names latent {number} twice: give it one value")
        found[number] = wanted
    return list(found) if mode == "ablate" and not any(found.values()) else found


def _check(args: SteerArgs) -> None:
    if not args.prompt:
        raise InputError('--prompt is missing: give a text to go on from, as in --prompt "The weather"')
    if not 1 <= args.new_tokens < 2**31:
        raise InputError(f"new_tokens is {args.new_tokens}: expected at least 1, and less than 2^31")
    if not 0 <= args.temperature < float("inf"):
        raise InputError(f"temperature is {args.temperature}: expected at least 0, and finite")
    if args.width is not None and args.width < NARROWEST:
        raise InputError(f"width is {args.width}: expected at least {NARROWEST} columns")
    check_argument("seed", args.seed, Seed)


def _model(args: SteerArgs, device: torch.device) -> tuple[Any, Any]:
    """The language model and its tokenizer. Raises InputError for one without a language-model head."""
    kind = models.architecture(args.model)
    if kind and not kind.endswith(models.CAUSAL):
        raise InputError(f"{args.model} is a {kind}, which has no language-model head: name a causal language model")
    tokenizer = models.load_tokenizer(args.model)
    return models.load_model(
        args.model, dtype=DTYPES[args.dtype], device=device, head="AutoModelForCausalLM"
    ), tokenizer


@torch.no_grad()
def _about(model: Any, sae: Any, steering: Steering, ids: Tensor, hook: str | None) -> list[str]:
    """What the latents are on the prompt by themselves, what they become, and how far that moves the activations."""
    sites = find_sites(model, sae, hook)
    seen: list[Tensor] = []

    def read(_site: Site, x: Tensor, _now: Pass, _number: int) -> None:
        seen.append(x[0])

    with at_sites(model, sites, read):
        model(ids)
    (x,) = seen
    f = sae.encode_latents(x, steering.latents.to(x.device)).amax(0).tolist()
    sign = {"clamp": "is set to", "add": "gets in addition", "scale": "is multiplied by", "ablate": "is set to"}
    lines = [
        f"latent {latent}: up to {largest:.4g} on the prompt, {sign[steering.mode]} {value:.4g}"
        for latent, largest, value in zip(steering.latents.tolist(), f, steering.values.tolist(), strict=True)
    ]
    if not sae.architecture.has_target:
        moved = (steering.read(x)[0].norm(dim=1) / x.float().norm(dim=1).clamp_min(1e-30)).median()
        lines.append(f"that adds {float(moved):.2g} times the length of the prompt's activations at {sites[0].name}")
    return lines


def _written(model: Any, tokenizer: Any, ids: Tensor, args: SteerArgs) -> str:
    """What the model writes after a prompt (1, length)."""
    draws = dict(do_sample=True, temperature=args.temperature) if args.temperature else dict(do_sample=False)
    torch.manual_seed(args.seed)
    pad = next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.new_tokens, pad_token_id=pad, **draws
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def side_by_side(left: tuple[str, str], right: tuple[str, str], width: int) -> list[str]:
    """Two titled texts in columns of one page, which is `width` wide."""
    each = (max(width, NARROWEST) - 3) // 2
    columns = []
    for title, text in (left, right):
        lines = [line for part in text.split("\n") for line in textwrap.wrap(part, each) or [""]]
        columns.append([title, "─" * each, *lines])
    return [f"{a:<{each}} │ {b}".rstrip() for a, b in zip_longest(*columns, fillvalue="")]
