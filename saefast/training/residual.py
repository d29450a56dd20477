"""Residual SAEs: trained on what another SAE, or several before them, leave over; and all of them together.

With input "error" the SAE encodes what is left over and reconstructs it, as an SAE of its own (Engels, Smith and
Tegmark 2024, arXiv 2410.14670, train_on_error.py). With "x" it encodes the activations themselves, and its target is
what is left over, so that all latents are of one input. Served together their outputs are added up, as in Koriagin et
al. 2025 (arXiv 2507.12990).
"""

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from saefast import ambient
from saefast.data.source import TARGET, Batch, Device, Source, X
from saefast.errors import InputError
from saefast.models.sae import SAE, load
from saefast.schema import check

# In SAEConfig.metadata of a residual SAE.
RESIDUAL = "residual_of"
Input = Literal["error", "x"]


class Recorded(TypedDict):
    """What a residual SAE's config says of the SAEs before it."""

    run: str
    input: Input
    digest: str


class Part(NamedTuple):
    """One of the SAEs of a stack, and what it encodes; the first one encodes x."""

    sae: SAE
    input: Input = "x"


class Stack:
    """SAEs that each reconstruct what those before them leave over; together they give the sum.

    Args:
        parts: the first SAE, then the residual ones in the order of their training.
    """

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts

    @property
    def before(self) -> "Stack | None":
        """All but the last; None where there is one alone."""
        return Stack(self.parts[:-1]) if len(self.parts) > 1 else None

    @property
    def widths(self) -> tuple[int, int]:
        """Of x and of what is reconstructed."""
        first = self.parts[0].sae
        return first.config.d_in, len(first.b_dec)

    def to(self, device: Device) -> "Stack":
        """The stack on a device: itself, or a copy."""
        device = torch.device(device)
        if all(part.sae.device == device for part in self.parts):
            return self
        return Stack([part._replace(sae=copy.deepcopy(part.sae).to(device)) for part in self.parts])

    def given(self, part: Part, x: Tensor, x_hat: Tensor) -> Tensor:
        """What a part encodes: x (B, d_in), or what is left over where the parts before it make x_hat of x."""
        return x - x_hat if part.input == "error" else x

    @torch.no_grad()
    @ambient.plainly()
    def x_hat(self, x: Tensor) -> Tensor:
        """x (B, d_in) -> (B, d_out), in x's dtype: the sum of what all make of it."""
        found = x.new_zeros(len(x), self.widths[1])
        for part in self.parts:
            found = found + part.sae(self.given(part, x, found)).x_hat.to(x.dtype)
        return found

    def last_given(self, x: Tensor) -> Tensor:
        """What the last part encodes of rows x (B, d_in), on the stack's device where there are others before it."""
        if self.before is None or self.parts[-1].input == "x":
            return x
        x = x.to(self.parts[0].sae.device, torch.float32)
        return self.given(self.parts[-1], x, self.before.x_hat(x))

    @torch.no_grad()
    def l0(self, x: Tensor) -> Tensor:
        """(B,) latents that are on in each row, over all SAEs."""
        found, on = x.new_zeros(len(x), self.widths[1]), torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for part in self.parts:
            x_hat, acts, _ = part.sae(self.given(part, x, found))
            found, on = found + x_hat.to(x.dtype), on + (acts != 0).sum(1)
        return on

    def digest(self) -> str:
        """Of all tensors of all SAEs: sha256, in hex."""
        found = hashlib.sha256()
        for part in self.parts:
            for name, tensor in sorted(part.sae.state_dict().items()):
                found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return found.hexdigest()


class ResidualSource(Source):
    """What a stack leaves over of another source's rows, for a residual SAE to train on.

    Its tensors are "x" alone, the error, or x as it is and the error as its target; see the module.

    Args:
        source: rows x, perhaps with a target; it is closed with this one.
        stack: of SAEs for these rows.
        kind: what the residual SAE encodes.

    Raises:
        InputError: the source is of other widths than the stack, or has a target, so that the error is not known where
            the SAE is to be used, and kind is "error".
    """

    def __init__(self, source: Source, stack: Stack, kind: Input = "error") -> None:
        d_in, d_out = stack.widths
        widths = source.d_in, source.widths.get(TARGET, source.d_in)
        if widths != (d_in, d_out):
            raise InputError(
                f"{source.source_name} has rows of {widths[0]} columns and targets of {widths[1]}; the SAE whose "
                f"residual is asked for maps {d_in} to {d_out}: give the data that it was trained on"
            )
        if kind == "error" and TARGET in source.widths:
            raise InputError(
                f"{source.source_name} has a target besides x: what a transcoder leaves over is not known from x, and "
                "cannot be what is encoded; encode x itself (--residual-input x)"
            )
        self.source, self.stack, self.kind = source, stack, kind
        self.widths = {X: d_out} if kind == "error" else {X: d_in, TARGET: d_out}
        self.n_rows = source.n_rows
        self.source_name = f"what is left over of {source.source_name}"
        self._digest = stack.digest()

    def mapped(self, batch: Batch, stack: Stack) -> Batch:
        """A batch of the source as one of this."""
        error = batch.get(TARGET, batch[X]) - stack.x_hat(batch[X])
        return {X: error} if self.kind == "error" else {X: batch[X], TARGET: error}

    def batches(
        self, batch_size: int, seed: int = 0, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Iterator[Batch]:
        stack = self.stack.to(device)
        return (self.mapped(batch, stack) for batch in self.source.batches(batch_size, seed, device, dtype))

    def heldout(self, batch_size: int, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Batch]:
        stack = self.stack.to(device)
        return (self.mapped(batch, stack) for batch in self.source.heldout(batch_size, device, dtype))

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict() | {RESIDUAL: self._digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rest = dict(state)
        if rest.pop(RESIDUAL, None) != self._digest:
            raise InputError(
                f"{self.source_name}: the position to resume from was reached with another SAE's residual; resume with "
                "the SAE that the run began with"
            )
        self.source.load_state_dict(rest)

    def describe_row(self, i: int, name: str = X) -> str:
        return self.source.describe_row(i, self._name(name))

    def describe_heldout(self, i: int, name: str = X) -> str:
        return self.source.describe_heldout(i, self._name(name))

    def stored_dtype(self, name: str = X) -> torch.dtype | None:
        return self.source.stored_dtype(self._name(name))

    def _name(self, name: str) -> str:
        """The source's tensor that one of this comes from."""
        return name if name in self.source.widths else X

    def tokens(self, seq: int) -> Tensor:
        return self.source.tokens(seq)

    def leave(self) -> None:
        self.source.leave()

    def close(self) -> None:
        self.source.close()


def stack_of(run: Path, sae: SAE, after: tuple[Path, ...] = ()) -> Stack:
    """The SAE of a run with those that it is the residual of, on its device. after: runs that are residuals of this.

    Raises:
        InputError: a run before it is not there or not finished, or holds another SAE than the next was trained on.
    """
    kept = before_of(run, sae.config.metadata)
    if kept is None:
        return Stack([Part(sae)])
    place = run / kept["run"]
    after = (*after, run.resolve())
    if place.resolve() in after:
        raise InputError(f"{run} is the residual of itself: its config was altered")
    try:
        before = stack_of(place, load(place, sae.device).requires_grad_(False), after)
    except InputError as error:
        raise InputError(f"{run} is trained on what {place} leaves over, which does not load: {error}") from None
    if before.digest() != kept["digest"]:
        raise InputError(f"{run} is trained on what {place} left over, and that SAE was changed since: put it back")
    return Stack([*before.parts, Part(sae, kept["input"])])


def trained_on(source: Source, stack: Stack) -> Source:
    """The rows that the last of a stack was trained on, from those that the first was trained on."""
    return source if stack.before is None else ResidualSource(source, stack.before, stack.parts[-1].input)


def before_of(run: Path, metadata: dict[str, Any]) -> Recorded | None:
    """What the metadata of a run's SAE says of those before it; None where it is not a residual SAE."""
    kept = metadata.get(RESIDUAL)
    if kept is None:
        return None
    found: Recorded = check(kept, Recorded, f"{run}: its config's {RESIDUAL}")
    return found


def describe_residual(run: Path, stack: Stack, kind: Input) -> dict[str, Any]:
    """SAEConfig.metadata of an SAE that is trained on what a run's leaves over."""
    kept: Recorded = {"run": str(run.expanduser().absolute()), "input": kind, "digest": stack.digest()}
    return {RESIDUAL: kept}
