"""SAEs inside a model that runs: `encode` keeps what they make of it, `replace` puts it in the model's place.

Both are context managers over models of transformers and of TransformerLens, in training and in `generate`, where the
model reads a prompt first and then, with a cache, one token at a time.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.integrations.passes import Chosen, Pass
from saefast.integrations.sites import Hooks, Site, at_sites, find_sites
from saefast.models.sae import SAE
from saefast.typed import typed

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class HookCode(NamedTuple):
    """The sparse code of a forward pass at one hook."""

    acts: Tensor
    """(batch, length, K) activations, 0 where a token has fewer than K; with their gradients."""
    idx: Tensor
    """(batch, length, K) int32 ids of their latents, distinct for a token."""


class Encoded(Mapping[str, HookCode]):
    """Codes by the names of their hooks: those of the last forward pass. passes: of every pass, in order, where they
    are kept; else of the last one."""

    def __init__(self, every_pass: bool = False) -> None:
        self._every_pass, self._number = every_pass, 0
        self.passes: list[dict[str, HookCode]] = []

    def _add(self, number: int, name: str, code: HookCode) -> None:
        if number != self._number or not self.passes:
            self.passes = [*self.passes, {}] if self._every_pass else [{}]
            self._number = number
        self.passes[-1][name] = code

    def __getitem__(self, name: str) -> HookCode:
        if not self.passes:
            raise InputError(f"the model has not run yet: there is no code of {name} to give")
        return self.passes[-1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.passes[-1] if self.passes else {})

    def __len__(self) -> int:
        return len(self.passes[-1]) if self.passes else 0


@typed
@contextlib.contextmanager
def encode(
    model: Any,
    saes: SAE | Mapping | list | tuple,
    *,
    hook: Hooks | None = None,
    every_pass: bool = False,
) -> Iterator[Encoded]:
    """While open, every forward pass of the model leaves the sparse codes of its activations.

    The model itself computes what it does otherwise. Codes keep their gradients where these are recorded.

    Args:
        model: of transformers, or of TransformerLens (anything with add_hook and run_with_hooks).
        saes: an SAE, at the hook that its metadata names; several; or {hook: sae}. See docs/hooks.md for names.
        hook: of a single SAE, instead of the one in its metadata; several where it takes their rows side by side.
        every_pass: keep the codes of all passes, as of every token that `generate` adds, not those of the last alone.

    Raises:
        InputError: an unknown hook, or one whose rows have another width; while the model runs, a module that runs
            several times in a pass where no turn is named; at the end, one that never ran.
    """
    found, sites = Encoded(every_pass), find_sites(model, saes, hook)

    def read(site: Site, x: Tensor, _now: Pass, number: int) -> None:
        found._add(number, site.name, HookCode(*site.sae.encode_sparse(x)))

    with at_sites(model, sites, read):
        yield found


@typed
@contextlib.contextmanager
def replace(
    model: Any,
    saes: SAE | Mapping | list | tuple,
    *,
    error_term: bool = False,
    change: Callable | None = None,
    positions: Any = "all",
    skip_ids: Iterable = (),
    hook: Hooks | None = None,
    target_hook: Hooks | None = None,
) -> Iterator[None]:
    """While open, reconstructions stand in the place of a model's activations: x̂ for x, and of a transcoder what it
    makes of one module's values for another's.

    Differentiable: in the SAE's parameters, and through its code in what the model computed before.

    Args:
        model, saes, hook: as for `encode`. Those of several SAEs see what the ones before them have put.
        error_term: add x - x̂ of the unchanged code, as a constant without a gradient: then the model computes what it
            does otherwise, but for what `change` does.
        change: acts (batch, length, K), idx (batch, length, K) -> others, which are decoded; None leaves the code.
        positions, skip_ids: the tokens at which this is done; see `saefast.integrations.passes.Chosen`. Special tokens
            that an SAE was not trained on are best left as they are: skip_ids=tokenizer.all_special_ids.
        target_hook: where a transcoder's output belongs, instead of the one in its metadata.

    Raises:
        InputError: as `encode`; an SAE of several places, or two at one; what `change` gives is no code.
    """
    sites, chosen = find_sites(model, saes, hook, target_hook), Chosen(positions, skip_ids)
    held: dict[str, tuple[Tensor, Tensor | None]] = {}

    def read(site: Site, x: Tensor, _now: Pass, _number: int) -> None:
        held[site.name] = _reconstructed(site.sae, x, change, error_term)

    def write(site: Site, y: Tensor, now: Pass) -> Tensor:
        x_hat, clean = taken(held, site, y)
        new = x_hat if clean is None else x_hat + (y.to(clean.dtype) - clean).detach()
        return put(new, y, now, chosen)

    with at_sites(model, sites, read, write):
        yield


def _reconstructed(sae: SAE, x: Tensor, change: Change | None, error_term: bool) -> tuple[Tensor, Tensor | None]:
    """What stands in for the target, and, with an error term, what the unchanged code decodes to."""
    acts, idx = sae.encode_sparse(x)
    changed = (acts, idx) if change is None else change(acts, idx)
    if not isinstance(changed, tuple) or [isinstance(one, Tensor) for one in changed] != [True, True]:
        raise InputError(
            f"change gives a {type(changed).__name__}: expected acts and idx, two tensors (batch, length, K)"
        )
    x_hat = sae.decode_sparse(*changed, x)
    if not error_term:
        return x_hat, None
    with torch.no_grad():
        return x_hat, x_hat if change is None else sae.decode_sparse(acts, idx, x)


def taken(held: dict[str, tuple[Tensor, Tensor | None]], site: Site, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """What was made of what a site reads, now that it is to write y (batch, length, d_out)."""
    found = held.pop(site.name, None)
    if found is None or found[0].shape != y.shape:
        raise InputError(
            f"{site.write} runs before {'+'.join(map(str, site.reads))}, from which the SAE is to know it: expected it "
            "after that, with as many tokens"
        )
    return found


def put(new: Tensor, y: Tensor, now: Pass, chosen: Chosen) -> Tensor:
    """new at the chosen tokens, y (batch, length, d) elsewhere, in y's dtype."""
    new = new.to(y.dtype)
    return new if chosen.everything else torch.where(chosen.where(now, y.device)[..., None], new, y)
