"""Architecture: what one kind of SAE says of itself. Engines, files, plan and evaluation ask this and nothing else.

An architecture answers how pre-activations become a code, which parts of a code reconstruct the target, what it trains
and keeps besides the four parameters, and what becomes of those when inputs are rescaled. It is one file and one line
in `saefast.models.registry`. Engines know codes and terms, never an architecture's name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.ops.code import Code
from saefast.ops.encoder import Encoder


class At(NamedTuple):
    """A moment of training."""

    step: int
    """Updates done."""
    total_steps: int
    """Of the run."""

    @property
    def share(self) -> float:
        """Of the run, that is behind it."""
        return self.step / max(self.total_steps, 1)


class Term(NamedTuple):
    """A part of the loss: the squared error of what a prefix of the code decodes to.

    A prefix is the entries whose key is below `bound`; see `Terms.by_latent`.
    """

    bound: int
    weight: float = 1.0
    unit: Literal["loss", "fvu"] = "loss"
    """What the weight multiplies: the recipe's reconstruction loss (`TrainConfig.loss`), or the squared error over the
    variance of the batch."""


class Terms(NamedTuple):
    """The reconstruction terms of a loss, bounds ascending: each prefix holds the ones before it."""

    prefixes: tuple[Term, ...]
    by_latent: bool = False
    """An entry's key is its latent (nested dictionaries), and not its place among its row's (nested top-k)."""
    main: int = 0
    """The prefix that the SAE serves: its error is the FVU and what AuxK reconstructs, its entries are what fired."""

    @property
    def bounds(self) -> list[int]:
        return [term.bound for term in self.prefixes]

    def part(self, code: Code, p: int) -> Code:
        """The entries of prefix p: the others are cut off, or 0."""
        bound = self.prefixes[p].bound
        if bound >= self.bounds[-1]:
            return code
        if not self.by_latent:
            return Code(code.acts[:, :bound], code.idx[:, :bound].contiguous())
        return code._replace(acts=torch.where(code.idx < bound, code.acts, 0))


class RowNorm(NamedTuple):
    """What normalises rows (B, d_in), each by figures of its own, and gives them back to their reconstructions."""

    centre: Tensor
    """(B, 1) what is subtracted."""
    divisor: Tensor
    """(B, 1) what is divided by then."""
    spread: Tensor
    """(B, 1) what a reconstruction is multiplied by, before the centre is added."""

    def normed(self, x: Tensor) -> Tensor:
        """x (B, d_in) as it is encoded."""
        return (x - self.centre) / self.divisor

    def undone(self, x_hat: Tensor) -> Tensor:
        """x_hat (B, d_out), of normalised rows, as the reconstruction of the rows themselves."""
        return x_hat * self.spread + self.centre


class Block(NamedTuple):
    """Latents that read some columns of x, and write some of the target."""

    latents: slice
    reads: slice
    writes: slice


@dataclass
class NoFields:
    """An architecture without settings of its own."""

    def check(self) -> None:
        """Raises InputError where a value is out of its bounds, also for configs of other architectures."""


class Architecture:
    """The base of all architectures: the parameters W_enc, W_dec, b_enc and b_dec alone, whole codes reconstruct.

    Subclasses say how a code comes about (`code`, `serve`), and override what else differs. Where it is read, `own` is
    a dict of the parameters that an architecture adds to those four, and `kept` one of its buffers and its state.

    Attributes:
        name: what `SAEConfig.activation` calls it.
        Fields: a dataclass of what it adds to SAEConfig, each with a default, described under "Attributes:"; see
            `NoFields`.
        TrainFields: the same for TrainConfig.
        presets: what it adds to a recipe of `saefast.engines.config.PRESETS`, by the recipe's name.
        engines: those that can train it.
        fixed_width: every token has the same number of entries, so a code is (B, K) and never CSR.
        has_target: what it reconstructs is not what it encodes. b_dec is the centre of targets then.
        config: the SAEConfig.
    """

    name: str
    Fields: ClassVar[type] = NoFields
    TrainFields: ClassVar[type] = NoFields
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    engines: tuple[str, ...] = ("fused", "autograd")
    fixed_width: bool = True
    has_target: bool = False

    def __init__(self, config: Any) -> None:
        self.config = config

    def check(self) -> None:
        """Raises InputError where the config's fields do not fit together."""

    def check_training(self, train: Any) -> None:
        """Raises InputError where a TrainConfig asks for what this architecture has not."""

    def recipe(self, name: str) -> dict[str, Any]:
        """What it adds to the recipe of that name."""
        return self.presets.get(name, {})

    @property
    def pointwise(self) -> Any:
        """The `saefast.models.pointwise.Pointwise` that decides over each latent by itself; None: latents compete."""
        return None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the four parameters."""
        L, D = self.config.n_latents, self.config.d_in
        return {"W_enc": (L, D), "W_dec": (L, D), "b_enc": (L,), "b_dec": (D,)}

    def blocks(self) -> tuple[Block, ...]:
        """Which latents read and write which columns: the same number of latents and of columns read, block by block.

        W_enc has the columns that are read alone. Decoder rows are 0 elsewhere than they write, and stay so.
        """
        (L, D_out), D = self.shapes()["W_dec"], self.config.d_in
        return (Block(slice(0, L), slice(0, D), slice(0, D_out)),)

    def parameters(self) -> dict[str, Tensor]:
        """The parameters that it adds to the four, by name, as they begin: float32 on the CPU; (L,) or a matrix."""
        return {}

    def buffers(self) -> dict[str, Tensor]:
        """What it keeps besides the parameters, by name, as it begins: CPU tensors that are saved, not trained."""
        return {}

    def state(self, train: Any) -> dict[str, Tensor]:
        """What only training keeps, by name, as it begins: CPU tensors that go into checkpoints."""
        return {}

    def start(self, sae: Any, rows: Tensor, targets: Tensor, train: Any) -> None:
        """Sets its own parameters and buffers in an SAE whose weights have begun, from the first rows of training.

        Args:
            sae: the SAE, to be changed in place.
            rows: (n, d_in), scaled as in training. targets: (n, d_out).
        """

    def restarted(self, own: dict[str, Tensor], alive: Tensor) -> dict[str, Tensor]:
        """What its (L,) parameters are in latents that begin anew: 0-d tensors by name. b_enc is 0 if left out.

        Args:
            own: with "b_enc" beside them.
            alive: (L,) bool, the latents that go on.
        """
        mine = self.parameters()
        return {name: value[alive].mean() for name, value in own.items() if name in mine and value.dim() == 1}

    def rates(self, train: Any) -> dict[str, float]:
        """Learning rates of its own parameters in units of all others', by name; one that is left out learns alike.

        Args:
            train: a TrainConfig with a number for lr.
        """
        return {}

    def width(self, train: Any) -> int:
        """Entries that a token has in training, on average."""
        return int(self.config.k)

    def ranked(self, train: Any) -> int:
        """Entries of each token that the encoder ranks in training, of which `code` chooses."""
        return self.width(train)

    def code(self, encoder: Encoder, train: Any, at: At) -> Code:
        """The code of a training batch, best entries of a row first."""
        raise NotImplementedError

    def serve(self, encoder: Encoder, buffers: dict[str, Tensor]) -> Code:
        """The code at inference, where a token's must not depend on those beside it."""
        raise NotImplementedError

    def alone(
        self, pre: Tensor, own: Mapping[str, Tensor], scale: Tensor | None, buffers: Mapping[str, Tensor]
    ) -> Tensor | None:
        """What `serve` makes of some latents, from their own pre-activations alone: (B, S), differentiable.

        None is where it depends on other latents.

        Args:
            pre: (B, S). own: "b_enc" and the (L,) parameters that it adds, of these S latents. scale: (S,) as
                `Encoder.scale`, or None.
        """
        return None

    def with_k(self, k: int) -> Any:
        """The SAEConfig of the same weights serving k latents a token.

        Raises:
            InputError: k is part of what was trained, or out of bounds.
        """
        raise InputError(f"k is {k}, but an SAE of activation={self.name!r} serves the k it was trained with alone")

    def terms(self, train: Any, at: At) -> Terms:
        """What reconstructs the target."""
        return Terms((Term(self.config.n_latents),), by_latent=True)

    def direct(self, x: Tensor, own: Any) -> Tensor | None:
        """What is added to the reconstruction straight from x (B, d_in), past the code: (B, d_out); None is nothing.

        Differentiable in the parameters of own, of which it may depend on the matrices.
        """
        return None

    def row_norm(self, x: Tensor) -> RowNorm | None:
        """What normalises x (B, d_in) before b_dec is subtracted, and is undone in its reconstruction; None is nothing.

        Differentiable in x, of which it makes float32 or finer.
        """
        return None

    @property
    def ranks_by_norm(self) -> bool:
        """Whether activations are measured in decoder norms, and latents ranked by that."""
        return bool(self.config.rescale_acts_by_decoder_norm)

    def norms(self, W_dec: Tensor, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        """(n, M) norms of the parts of decoder rows (n, d_out), M of equal width; a row's norm is their sum.

        Args:
            buffers: those of an SAE for raw rows, which a part's scale may stand in; None in training.
        """
        return W_dec.norm(dim=1, keepdim=True)

    def parts(self) -> tuple[int, ...]:
        """Widths of what lies side by side in x, each of which is brought to one scale before training."""
        return (int(self.config.d_in),)

    def target_parts(self) -> tuple[int, ...]:
        """As `parts`, of a target that is not x."""
        return self.shapes()["b_dec"]

    def levels(self, buffers: Mapping[str, Tensor]) -> Tensor | None:
        """(d_out,) what the columns of targets were multiplied by in training, up to one number for all, so that parts
        count alike in a figure over all of them; None where they have one scale."""
        return None

    def observed(self, kept: dict[str, Tensor], code: Code, scale: Tensor | None, at: At, train: Any) -> Any:
        """What is kept after a training step with this code; tensors of the same shapes.

        Args:
            scale: (n_latents,) what activations were ranked by, as `Encoder.scale`.
            at: the step, as it began.
        """
        return kept

    def unlevelled(self, tensors: dict[str, Tensor], levels: Tensor, target_levels: Tensor) -> dict[str, Tensor]:
        """The tensors that serve x, by name, of an SAE trained on levels · x, column by column: only those that change.

        Args:
            levels: (d_in,), one number for each of the `parts` of x. target_levels: (d_out,), likewise.
        """
        raise NotImplementedError

    def rescaled(self, tensors: dict[str, Tensor], scale: float, target_scale: float) -> dict[str, Tensor]:
        """The tensors that serve x, by name, of an SAE trained on scale · x: only those that change.

        Own parameters and buffers are taken for something that activations are compared with; override it where that
        is not so.

        acts(scale · x) / scale = acts(x) where biases, and all that activations are compared with, are divided. Where
        the target was scaled by another number, activations are measured in that, and W_enc makes up for it.
        """
        compared = "b_enc", "b_dec", *self.parameters(), *self.buffers()
        found = {name: tensors[name] / target_scale for name in compared}
        if target_scale != scale:
            found["W_enc"] = tensors["W_enc"] * (scale / target_scale)
        return found


class Layer(Architecture):
    """An architecture laid over another: what it does not override is the other's.

    Attributes:
        inner: the architecture beneath.
    """

    def __init__(self, config: Any, inner: Architecture) -> None:
        super().__init__(config)
        self.inner = inner
        self.name, self.fixed_width = inner.name, inner.fixed_width
        self.has_target = type(self).has_target or inner.has_target
        self.engines = tuple(engine for engine in type(self).engines if engine in inner.engines)

    @classmethod
    def wanted(cls, config: Any) -> bool:
        """Whether a config asks for this layer."""
        raise NotImplementedError

    def check(self) -> None:
        self.inner.check()

    def check_training(self, train: Any) -> None:
        self.inner.check_training(train)

    def recipe(self, name: str) -> dict[str, Any]:
        return self.inner.recipe(name) | super().recipe(name)

    @property
    def pointwise(self) -> Any:
        return self.inner.pointwise

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.inner.shapes()

    def blocks(self) -> tuple[Block, ...]:
        return self.inner.blocks()

    def parameters(self) -> dict[str, Tensor]:
        return self.inner.parameters()

    def buffers(self) -> dict[str, Tensor]:
        return self.inner.buffers()

    def state(self, train: Any) -> dict[str, Tensor]:
        return self.inner.state(train)

    def start(self, sae: Any, rows: Tensor, targets: Tensor, train: Any) -> None:
        self.inner.start(sae, rows, targets, train)

    def restarted(self, own: dict[str, Tensor], alive: Tensor) -> dict[str, Tensor]:
        return self.inner.restarted(own, alive)

    def rates(self, train: Any) -> dict[str, float]:
        return self.inner.rates(train)

    def width(self, train: Any) -> int:
        return self.inner.width(train)

    def ranked(self, train: Any) -> int:
        return self.inner.ranked(train)

    def code(self, encoder: Encoder, train: Any, at: At) -> Code:
        return self.inner.code(encoder, train, at)

    def serve(self, encoder: Encoder, buffers: dict[str, Tensor]) -> Code:
        return self.inner.serve(encoder, buffers)

    def alone(
        self, pre: Tensor, own: Mapping[str, Tensor], scale: Tensor | None, buffers: Mapping[str, Tensor]
    ) -> Tensor | None:
        return self.inner.alone(pre, own, scale, buffers)

    def with_k(self, k: int) -> Any:
        return self.inner.with_k(k)

    def terms(self, train: Any, at: At) -> Terms:
        return self.inner.terms(train, at)

    def direct(self, x: Tensor, own: Any) -> Tensor | None:
        return self.inner.direct(x, own)

    def row_norm(self, x: Tensor) -> RowNorm | None:
        return self.inner.row_norm(x)

    @property
    def ranks_by_norm(self) -> bool:
        return self.inner.ranks_by_norm

    def norms(self, W_dec: Tensor, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        return self.inner.norms(W_dec, buffers)

    def parts(self) -> tuple[int, ...]:
        return self.inner.parts()

    def target_parts(self) -> tuple[int, ...]:
        return self.inner.target_parts()

    def levels(self, buffers: Mapping[str, Tensor]) -> Tensor | None:
        return self.inner.levels(buffers)

    def observed(self, kept: dict[str, Tensor], code: Code, scale: Tensor | None, at: At, train: Any) -> Any:
        # What the layer itself keeps stays as it is.
        return kept | self.inner.observed(kept, code, scale, at, train)

    def unlevelled(self, tensors: dict[str, Tensor], levels: Tensor, target_levels: Tensor) -> dict[str, Tensor]:
        return self.inner.unlevelled(tensors, levels, target_levels)

    def rescaled(self, tensors: dict[str, Tensor], scale: float, target_scale: float) -> dict[str, Tensor]:
        return self.inner.rescaled(tensors, scale, target_scale)


def smallest_positive(code: Code, scale: Tensor | None) -> Tensor:
    """The smallest activation above 0 of a code, 0-d, inf where there is none; in the units that it was ranked in."""
    ranked = code.acts if scale is None else code.acts * scale[code.idx.long()].to(code.acts.dtype)
    return torch.where(ranked > 0, ranked, torch.inf).amin()
