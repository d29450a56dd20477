"""Steering: a model that runs with some latents of an SAE set to other activations.

A decoder is linear, so the long way (encode, set f to v, decode, add what the SAE had missed) comes to

    x' = x + Σ (v - f) · d

exactly, d being a latent's decoder row: no decode, and f of the steered latents alone where each is on by itself.
Templeton et al. 2024 (transformer-circuits.pub/2024/scaling-monosemanticity) set one latent at every token, keep what
the SAE missed, and count v in units of the latent's largest activation.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from saefast import ambient
from saefast.analysis.latent_stats import max_acts as max_acts_in
from saefast.errors import InputError
from saefast.formats.opening import load
from saefast.integrations.hooks import put, taken
from saefast.integrations.passes import Chosen, Pass
from saefast.integrations.sites import Hooks, Site, at_sites, device_of, find_sites
from saefast.models.sae import SAE
from saefast.schema import check_argument
from saefast.typed import typed

Mode = Literal["clamp", "add", "ablate", "scale"]
Unit = Literal["abs", "max"]
Latents = Mapping[int, float] | Sequence[int]


class Steering:
    """What `steer` does to activations, as a function of them: steering(x) -> x' of the same shape, or of a transcoder
    steering(x, y) -> y' for what it takes and the y that it reconstructs. Differentiable.

    Args:
        sae: the SAE.
        latents: {latent: value}; for mode "ablate" ids alone.
        mode: what a latent's activation f becomes: "clamp" the value, "add" f + value, "scale" f · value, "ablate" 0.
        unit: "abs" counts values of "clamp" and "add" as activations, "max" in largest activations that were seen.
        error_term: keep what the SAE does not reconstruct; False is x' = x̂ + Σ (v - f) · d.
        max_acts: for unit "max", (n_latents,) the largest activations, or the folder of a run that `saefast eval` or
            `saefast features` has been over.

    Raises:
        InputError: no such latent, a value that is no finite number, a unit that is not known.
    """

    @typed
    def __init__(
        self,
        sae: SAE,
        latents: Mapping | Sequence,
        *,
        mode: Mode = "clamp",
        unit: Unit = "abs",
        error_term: bool = True,
        max_acts: Tensor | str | Path | None = None,
    ) -> None:
        self.sae, self.mode, self.error_term = sae, mode, error_term
        values = _values(latents, mode, sae.config.n_latents)
        if unit == "max":
            values = _in_maxima(values, mode, max_acts, sae.config.n_latents)
        self.latents = torch.tensor(list(values), dtype=torch.int64, device="cpu")
        self.values = torch.tensor(list(values.values()), dtype=torch.float64, device="cpu")

    @ambient.plainly()
    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None and self.sae.architecture.has_target:
            raise InputError("y is not given: this SAE is a transcoder, whose output is steered; pass steering(x, y)")
        return joined(*self.read(x), x if y is None else y)

    @ambient.plainly()
    def read(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (..., d_in) -> what is added (..., d_out), and x̂ where that takes the place of what is there."""
        latents, x_hat, f = self.latents.to(x.device), None, None
        if not self.error_term:
            acts, idx = self.sae.encode_sparse(x)
            f, x_hat = self.sae.picked(acts, idx, latents), self.sae.decode_sparse(acts, idx, x)
        elif self.mode != "add":
            f = self.sae.encode_latents(x, latents)
        return self.sae.decode_latents(self._change(f, x), latents, x), x_hat

    def _change(self, f: Tensor | None, x: Tensor) -> Tensor:
        """(..., S): what is added to the activations f."""
        dtype = torch.float64 if self.sae.dtype == torch.float64 else torch.float32
        v = self.values.to(x.device, dtype)
        if self.mode == "add":
            return v.expand(*x.shape[:-1], -1)
        assert f is not None
        match self.mode:
            case "clamp":
                return v - f
            case "scale":
                return (v - 1) * f
        return -f


def joined(added: Tensor, x_hat: Tensor | None, y: Tensor) -> Tensor:
    """What `Steering.read` gives, with y (..., d_out), in y's dtype."""
    kept = y if x_hat is None else x_hat
    return (kept.to(torch.promote_types(kept.dtype, added.dtype)) + added).to(y.dtype)


def _values(latents: Any, mode: Mode, n_latents: int) -> dict[int, float]:
    """The latents and their values. Raises InputError."""
    pairs = list(latents.items()) if isinstance(latents, Mapping) else [(one, 0.0) for one in latents]
    if not pairs or isinstance(latents, str):
        raise InputError(f"latents is {latents!a}: expected {{latent: value}}, such as {{8249: 100.0}}")
    if mode != "ablate" and not isinstance(latents, Mapping):
        raise InputError(
            f"latents is a {type(latents).__name__}: mode {mode!r} needs a value for each, {{latent: value}}"
        )
    for latent, value in pairs:
        check_argument("a key of latents", latent, int)
        check_argument(f"the value of latent {latent}", value, float)
        if not 0 <= latent < n_latents:
            raise InputError(f"latents has {latent}: expected ids from 0 to {n_latents - 1}")
        if not math.isfinite(value):
            raise InputError(f"the value of latent {latent} is {value}: expected a finite number")
        if mode == "ablate" and value:
            raise InputError(
                f"latents gives {latent} a value of {value}, and mode 'ablate' sets activations to 0: give [{latent}], "
                "or use mode 'clamp'"
            )
    found = {int(latent): float(value) for latent, value in pairs}
    if len(found) < len(pairs):
        raise InputError(f"latents is {str(latents)[:60]}: one is named twice")
    return found


def _in_maxima(values: dict[int, float], mode: Mode, given: Any, n_latents: int) -> dict[int, float]:
    """Values in units of the latents' largest activations, as activations. Raises InputError."""
    if mode not in ("clamp", "add"):
        raise InputError(f"unit is 'max', which mode {mode!r} has not: a factor has no unit, and 0 is 0; leave it out")
    if given is None:
        raise InputError(
            "unit is 'max', and the largest activations are not known: give the folder of a run as sae, or max_acts, "
            "that folder or a tensor (n_latents,)"
        )
    maxima = given if isinstance(given, Tensor) else max_acts_in(given, n_latents)
    if maxima.shape != (n_latents,) or not maxima.is_floating_point():
        raise InputError(f"max_acts is {maxima.dtype} of shape {tuple(maxima.shape)}: expected ({n_latents},) floats")
    found = {latent: value * float(maxima[latent]) for latent, value in values.items()}
    for latent in found:
        if not 0 < float(maxima[latent]) < math.inf:
            raise InputError(
                f"latent {latent} has a largest activation of {float(maxima[latent])}: it never fired where that was "
                "measured; steer it with unit='abs'"
            )
    return found


@typed
@contextlib.contextmanager
def steer(
    model: Any,
    sae: SAE | str | Path,
    latents: Mapping | Sequence,
    *,
    mode: Mode = "clamp",
    unit: Unit = "abs",
    error_term: bool = True,
    positions: Any = "all",
    skip_ids: Iterable = (),
    hook: Hooks | None = None,
    target_hook: Hooks | None = None,
    max_acts: Tensor | str | Path | None = None,
) -> Iterator[Steering]:
    """While open, some latents of an SAE have other activations in every forward pass of a model, `generate` included.

    Exactly x' = x + Σ (v - f) · d at the chosen tokens: nothing is decoded, and only the steered latents are encoded
    where the architecture allows it (relu, jumprelu, gated, and batchtopk with its threshold).

        with saefast.steer(model, sae, {8249: 100.0}):
            model.generate(**tokenizer("The reliability of Wikipedia is", return_tensors="pt"))

    Args:
        model: of transformers, or of TransformerLens (anything with add_hook and run_with_hooks).
        sae: the SAE, or the folder of a run, which says the largest activations too. Of a transcoder what it gives is
            steered, by what it takes.
        latents, mode, unit, error_term, max_acts: see `Steering`.
        positions, skip_ids: the tokens that are steered; see `saefast.integrations.passes.Chosen`. All, padding
            included, which nothing reads.
        hook, target_hook: the modules, instead of those in the SAE's metadata.

    Raises:
        InputError: as `Steering`; an unknown hook; an SAE of several places, or one on what another leaves over.
    """
    if not isinstance(sae, SAE):
        max_acts = sae if max_acts is None else max_acts
        sae = load(sae, device_of(model)).requires_grad_(False)
    steering = Steering(sae, latents, mode=mode, unit=unit, error_term=error_term, max_acts=max_acts)
    sites, chosen = find_sites(model, sae, hook, target_hook), Chosen(positions, skip_ids)
    held: dict[str, tuple[Tensor, Tensor | None]] = {}

    def read(site: Site, x: Tensor, _now: Pass, _number: int) -> None:
        held[site.name] = steering.read(x)

    def write(site: Site, y: Tensor, now: Pass) -> Tensor:
        return put(joined(*taken(held, site, y), y), y, now, chosen)

    with at_sites(model, sites, read, write):
        yield steering
