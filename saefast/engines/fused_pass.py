"""A batch's forward and backward pass on the entries that fired. Nothing of the step is written here.

The one thing that changes is decoder rows that slept: they are settled when they are about to be read, which leaves
them what dense training would have made of them by now.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saefast.engines import auxk_block
from saefast.engines.config import TrainConfig
from saefast.engines.engine import not_finite
from saefast.engines.hot import Block, HotLatents
from saefast.engines.losses import DeadLatents, auxk_runs, auxk_wanted, reconstruction_weight
from saefast.models.config import SAEConfig
from saefast.ops import dispatch as ops
from saefast.ops import mixed
from saefast.ops.code import Code, Number, Prefixes
from saefast.ops.groups import Entries, Groups
from saefast.optim.dispatch import row_ops
from saefast.optim.state import AnyMatrix, RowGradient

# Sums of squares that fp32 holds with room to spare. Beyond them a batch is refused before anything is looked at.
OVERFLOW = 1e30


@dataclasses.dataclass
class Model:
    """What a pass reads."""

    sae: SAEConfig
    config: TrainConfig
    matrices: dict[str, AnyMatrix]
    """W_enc, W_dec, b_enc, b_dec."""
    dead: DeadLatents
    hot: HotLatents | None
    mse_scale: float
    step: int
    dense: bool
    """Every row takes part in the update, so runs are wanted for all latents."""
    wake: Callable[[Tensor], None]
    """Settles the decoder rows of latents (n,) int32."""
    buffer: Callable[..., Tensor]
    """Memory by name and shape."""


@dataclasses.dataclass
class Part:
    """One loss's share of the entries, and of the gradient."""

    acts: Tensor
    """(B, K)."""
    idx: Tensor
    """(B, K) int32."""
    grad_acts: Tensor
    """(B, K)."""


@dataclasses.dataclass
class BlockGradient:
    """Dense gradient rows of latents that a block did: the hot ones, or AuxK's."""

    ids: Tensor
    """(H,) int32."""
    for_dec: Tensor
    """(H, D)."""
    for_enc: Tensor


@dataclasses.dataclass
class Gradient:
    """A batch's gradient, and what its step reports. Its loss is for the caller to look at before anything is written.

    Numbers lie where they were worked out, so that a step makes the host wait for all of them at once.
    """

    runs: Groups
    """Of the entries below; latents of a block have none."""
    for_dec: RowGradient
    for_enc: RowGradient
    blocks: list[BlockGradient]
    """No latent is in two of them."""
    b_enc: Tensor
    """(L,)."""
    b_dec: Tensor
    """(D,)."""
    since: Tensor
    """(L,) the dead-latent counters after the batch."""
    code: Groups
    """Of the batch's whole code, AuxK's entries left out."""
    loss: Number
    fvu: Number
    auxk: Number
    l0: Number


class Pass:
    """One batch x (B, D) going through a model. Call `gradient`."""

    def __init__(self, model: Model, x: Tensor) -> None:
        self.model, self.x, self.config = model, x, model.config
        self.backend = row_ops(x)
        self.aux: auxk_block.Block | None = None
        k = model.sae.k
        # Nested prefixes of the code, best latents first: k, and 4k where MultiTopK asks for it.
        self.bounds = [k, min(4 * k, model.sae.n_latents)] if self.config.multi_topk_coef else [k]
        self.b_dec = model.matrices["b_dec"].w[0]
        self.centred = x - self.b_dec if model.sae.apply_b_dec_to_input else x

    def gradient(self) -> Gradient:
        """The whole pass.

        Raises:
            InputError: x or the code is not finite.
        """
        variance, squares = self.backend.batch_sums(self.x)
        self.acts, self.idx = self._encode(self.bounds[-1])
        self.runs = self._runs(self.idx, self.acts != 0)
        since = self._counters()
        dead_ids = self._look(variance, squares, self._dead(since))
        self.model.wake(self.runs.latents)

        main, loss, fvu = self._reconstruct(with_error=dead_ids is not None)
        parts: list[Part] = [main]
        auxk: Number = 0.0
        if dead_ids is not None:
            part, auxk = self._auxk(dead_ids, main)
            parts += [part] if part is not None else []
        loss = loss + self.config.auxk_coef * auxk
        return Gradient(*self._entries(parts), since, self.runs, loss, fvu, auxk, self._fired() / len(self.x))

    def _counters(self) -> Tensor:
        """The dead-latent counters after this batch."""
        dead, k = self.model.dead, self.model.sae.k
        if self.config.fired_above != 0 or len(self.bounds) > 1:
            return dead.after(self.acts[:, :k], self.idx[:, :k])
        # What fired is what has a run: no need to look for it again.
        return dead.unless(self.runs.counts(self.model.sae.n_latents) > 0, len(self.x))

    def _dead(self, since: Tensor) -> Tensor | None:
        """(n_latents,) bool: what AuxK may revive; None where there is no AuxK."""
        dead = self.model.dead
        return dead.mask(since if self.config.dead_update_first else dead.since) if self.config.auxk_coef else None

    def _look(self, variance: Number, squares: Number, dead: Tensor | None) -> Tensor | None:
        """The first wait for a GPU: refuses a batch before any row is settled, and counts what is dead.

        Returns:
            (n_dead,) ids for AuxK to revive, or None where it has nothing to say.
        """
        hot = self.model.hot
        clashes: Number = hot.has(dead) if hot is not None and dead is not None else 0.0
        self.variance, squares, reach, n_dead, clashing = fetched(
            variance, squares, self._reach(), 0.0 if dead is None else dead.sum(), clashes
        )
        if not 0 < self.variance <= squares * (1 + 1e-6) < OVERFLOW:
            raise not_finite(self.model.step, math.nan, self.x)
        if not reach * reach * len(self.x) < OVERFLOW:
            raise not_finite(self.model.step, math.nan if math.isnan(reach) else math.inf, self.x)
        if clashing:
            self.model.hot = None  # a latent's gradient has to come from one place
        return placed(dead, int(n_dead)) if dead is not None and auxk_runs(int(n_dead), self.config) else None

    def _fired(self) -> Number:
        """How many latents fired, over all tokens."""
        if len(self.bounds) > 1:
            return (self.acts[:, : self.model.sae.k] > 0).sum()
        return self.runs.offsets[-1]

    def _encode(self, k: int, latents: Tensor | None = None, relu: bool = True) -> tuple[Tensor, Tensor]:
        enc, b_enc = self.model.matrices["W_enc"], self.model.matrices["b_enc"].w[0]
        options: dict[str, Any] = dict(latents=latents, scale=self.model.matrices["W_dec"].norms, relu=relu)
        if enc.shadow is None:
            return ops.encode_topk(self.centred, enc.w, b_enc, k, **options)
        return mixed.encode_topk_mixed(self.centred, enc.shadow, enc.w, b_enc, k, **options)

    def _reach(self) -> Number:
        """How far a token's code may reach: NaN or inf for a code that is not finite, 0-d."""
        norms = self.model.matrices["W_dec"].norms
        largest = self.acts[:, 0].max() if norms is None else self.acts[:, 0].max() * norms.max()
        return largest.double() * self.acts.shape[1]

    def _runs(self, idx: Tensor, keep: Tensor) -> Groups:
        found: Groups = self.backend.group_entries(idx.flatten(), keep.flatten(), self.model.sae.n_latents)
        return found

    def _reconstruct(self, *, with_error: bool) -> tuple[Part, Number, Number]:
        """Decode and the reconstruction losses: their part of the entries, their value, and the FVU.

        Makes `planes` (P or P + 1, B, D), the weighted residuals; the last one is AuxK's to fill.
        """
        (B, D), P, shape = self.x.shape, len(self.bounds), self.x.shape
        variance = torch.tensor(self.variance, dtype=torch.float64, device="cpu")
        weight: list[Number] = [float(reconstruction_weight(shape, variance, self.config, self.model.mse_scale))]
        if self.config.multi_topk_coef:
            weight.append(self.config.multi_topk_coef / self.variance)
        self.planes = self.model.buffer("planes", P + with_error, B, D)
        self.error = self.model.buffer("error", B, D) if with_error else None
        grad, squares = self._decode(weight)
        sums = [serial_sum(row) for row in squares]
        return (
            Part(self.acts, self.idx, grad),
            sum(w * s for w, s in zip(weight, sums, strict=True)),
            sums[0] / self.variance,
        )

    def _decode(self, weight: list[Number]) -> tuple[Tensor, Tensor]:
        """decode_loss, with the hot latents taken out and done as matrix products."""
        W_dec, planes = self.model.matrices["W_dec"].w, self.planes[: len(self.bounds)]
        hot = self.hot = None if self.model.hot is None else self.model.hot.block(self.acts, self.idx)
        x, acts = self.x, self.acts
        if hot is not None:
            W_hot = W_dec[hot.ids].to(x.dtype)
            x, acts = x - hot.acts @ W_hot, torch.where(hot.is_hot, 0, acts)
        self.prefixes = Prefixes(self.bounds, weight)
        decoded = self.backend.decode_loss(
            x, Code(acts, self.idx), W_dec, self.b_dec, self.prefixes, planes, error=self.error
        )
        if hot is None:
            return decoded.grad_acts, decoded.squares
        self.grad_hot = (-2 * planes[0] @ W_hot.T) * (hot.acts > 0)
        there = self.grad_hot.gather(1, hot.slot)
        return torch.where(hot.is_hot, there, decoded.grad_acts), decoded.squares

    def _auxk(self, dead_ids: Tensor, main: Part) -> tuple[Part | None, Number]:
        """AuxK: dead latents reconstruct the residual. Its part, if there is one, and its value without coef."""
        assert self.error is not None
        config, plane, k = self.config, self.planes[-1], min(auxk_wanted(self.x.shape[1], self.config), len(dead_ids))
        weight = self._auxk_weight(self.error, len(dead_ids))
        if k == 0:
            torch.mul(self.error, config.auxk_coef * weight, out=plane)
            return None, weight * self.backend.batch_sums(self.error)[1]
        if not self.model.dense and len(self.bounds) == 1 and auxk_block.pays_off(self.x, k, len(dead_ids)):
            self.aux = self._auxk_block(dead_ids, k, config.auxk_coef * weight, main)
            return None, weight * serial_sum(self.aux.squares)
        acts, idx = self._encode(k, dead_ids, config.auxk_relu)
        self.model.wake(self._runs(idx, acts != 0).latents)
        prefixes = Prefixes([k], [config.auxk_coef * weight])
        decoded = self.backend.decode_loss(
            *(self.error, Code(acts, idx), self.model.matrices["W_dec"].w, None, prefixes, plane[None]),
            relu=config.auxk_relu,
        )
        return Part(acts, idx, decoded.grad_acts), weight * serial_sum(decoded.squares[0])

    def _auxk_block(self, dead_ids: Tensor, k: int, weight: Number, main: Part) -> auxk_block.Block:
        """AuxK by matrix products, which take over the main code's entries of dead latents if there may be any."""
        assert self.error is not None
        config, enc, dec = self.config, self.model.matrices["W_enc"], self.model.matrices["W_dec"]
        # Ranked by the norms of before the rows are settled, as the main code and the sparse form of AuxK are.
        norms = None if dec.norms is None else dec.norms.clone()
        self.model.wake(dead_ids.int())
        encoder = auxk_block.Encoder(enc.w, self.model.matrices["b_enc"].w[0], dec.w, norms)
        # A latent that has just fired is not dead, if it was asked after that and if every activation counts as firing.
        silent = config.dead_update_first and (config.fired_above is None or config.fired_above <= 0)
        code = None if silent else auxk_block.Code(main.acts, main.idx, main.grad_acts, self.planes[0])
        return auxk_block.auxk_block(
            *(self.centred, self.error, self.planes[-1], encoder, dead_ids, k, weight), relu=config.auxk_relu, code=code
        )

    def _auxk_weight(self, error: Tensor, n_dead: int) -> Number:
        """As `losses.auxk_weight`, with sums that do not depend on the number of threads."""
        B, D = error.shape
        few = min(n_dead / auxk_wanted(D, self.config), 1.0) if self.config.auxk_scale_few_dead else 1.0
        if self.config.auxk_denominator == "none":
            return few / B
        if self.config.auxk_denominator == "inputs":
            return few / self.variance
        unexplained: Number = self.backend.batch_sums(error)[0]
        if isinstance(unexplained, Tensor):
            return torch.where(unexplained > 0, few / unexplained, 0.0)
        return few / unexplained if unexplained > 0 else 0.0

    def _entries(
        self, parts: list[Part]
    ) -> tuple[Groups, RowGradient, RowGradient, list[BlockGradient], Tensor, Tensor]:
        """The parts as entries grouped by latent, the blocks' rows beside them, and the biases' gradients."""
        D, n_latents = self.x.shape[1], self.model.sae.n_latents
        runs, taken = self.runs, self._taken()
        if taken or len(parts) > 1:
            keep = _joined(parts, "acts") != 0
            for entries_of_block in taken:
                keep[: self.idx.numel()] &= ~entries_of_block.flatten()
            runs = self._runs(_joined(parts, "idx"), keep)
        code = [(Code(part.acts, part.idx), part.grad_acts) for part in parts]
        entries: Entries = self.backend.fill_entries(runs, code, self.prefixes, n_latents)
        offsets = runs.over_all(n_latents) if self.model.dense else runs.offsets
        for_dec = RowGradient(self.planes.view(-1, D), offsets, entries.dec_row, entries.dec_coef)
        for_enc = RowGradient(self.centred, offsets, entries.enc_row, entries.enc_coef)
        b_enc, blocks = entries.grad_by_latent, []
        if self.hot is not None:
            b_enc[self.hot.ids] = self.grad_hot.sum(0)
            blocks.append(self._hot_rows(self.hot))
        if self.aux is not None:
            b_enc[self.aux.ids] = self.aux.b_enc
            blocks.append(BlockGradient(self.aux.ids.int(), self.aux.for_dec, self.aux.for_enc))
        return runs, for_dec, for_enc, blocks, b_enc, self._b_dec(b_enc, [runs.latents, *(b.ids for b in blocks)])

    def _taken(self) -> list[Tensor]:
        """(B, K) bool masks of the code's entries that blocks have taken over."""
        found = [] if self.hot is None else [self.hot.is_hot]
        return found if self.aux is None or self.aux.taken is None else [*found, self.aux.taken]

    def _hot_rows(self, hot: Block) -> BlockGradient:
        return BlockGradient(hot.ids.int(), -2 * hot.acts.T @ self.planes[0], self.grad_hot.T @ self.centred)

    def _b_dec(self, b_enc: Tensor, touched: list[Tensor]) -> Tensor:
        """The gradient of b_dec (D,), from that of b_enc, which is 0 but for the latents touched."""
        grad: Tensor = -2 * self.backend.weighted_row_sum(self.planes[0])
        if self.config.auxk_b_dec_grad and len(self.planes) > len(self.bounds):
            grad -= 2 * self.backend.weighted_row_sum(self.planes[-1])
        if not self.model.sae.apply_b_dec_to_input:
            return grad
        # b_dec is subtracted from what the encoder sees: -Σ over entries of grad · W_enc row, latent by latent.
        W_enc = self.model.matrices["W_enc"].w
        for latents in touched:
            grad -= self.backend.weighted_row_sum(W_enc, latents, b_enc[latents.long()])
        return grad


def _joined(parts: list[Part], name: str) -> Tensor:
    tensors = [getattr(p, name).flatten() for p in parts]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def serial_sum(values: Tensor) -> Number:
    """Σ values in float64 and in an order that does not depend on the number of threads."""
    if values.device.type != "cpu":
        return values.double().sum()
    return float(values.double().numpy().sum())


def fetched(*values: Number) -> list[float]:
    """The numbers, on the host, which waits once for those that lie on a GPU."""
    away = [v for v in values if isinstance(v, Tensor) and v.device.type != "cpu"]
    if not away:
        return [float(v) for v in values]
    # One after the other they would cost a wait each. In float64, which holds counts below 2**53 too.
    found = iter(torch.stack([v.double() for v in away]).tolist())
    return [next(found) if any(v is a for a in away) else float(v) for v in values]


def placed(mask: Tensor, n: int) -> Tensor:
    """(n,) ascending int64: where the n true values of mask (L,) are."""
    if mask.device.type == "cpu":
        return mask.nonzero().squeeze(1)
    # Their number is known, so the host need not wait for it again.
    return torch.searchsorted(mask.cumsum(0), torch.arange(1, n + 1, dtype=torch.int64, device=mask.device))
