"""A batch's forward and backward pass on the entries that fired. Nothing of the step is written here.

One thing changes: decoder rows that were left alone are settled before they are read, that is, they become what dense
training would have made of them by now.
"""

import math

import torch
from torch import Tensor

from saefast.engines import auxk_block
from saefast.engines.derived import Direct
from saefast.engines.engine import not_finite
from saefast.engines.gradient import OVERFLOW, BlockGradient, Gradient, Model, fetched, placed, serial_sum
from saefast.engines.hot import Block
from saefast.engines.losses import auxk_runs, auxk_wanted, auxk_weight, term_weights
from saefast.engines.paid import pay, with_price
from saefast.ops.code import Code, Number, Prefixes
from saefast.ops.encoder import Encoder
from saefast.ops.groups import Entries, Groups
from saefast.optim.dispatch import row_ops
from saefast.optim.state import RowGradient


class Pass:
    """One batch x (B, D) going through a model, to reconstruct target (B, D). Call `gradient`."""

    def __init__(self, model: Model, x: Tensor, target: Tensor) -> None:
        self.model, self.x, self.target = model, x, target
        self.config, self.weights = model.config, model.weights
        self.terms = model.architecture.terms(model.config, model.at)
        self.n_latents, self.hot_latents = len(model.weights.enc.w), model.hot
        self.backend = row_ops(x)
        self.hot: Block | None = None
        self.aux: auxk_block.Block | None = None
        self.is_centred = self.weights.sae.config.apply_b_dec_to_input
        self.centred = x - self.weights.b_dec if self.is_centred else x
        enc, self.norms = self.weights.enc, self.weights.norms()
        self.encoder = Encoder(
            self.centred, enc.w, self.weights.b_enc, self.norms, enc.shadow, self.weights.own_values()
        )

    def gradient(self) -> Gradient:
        """The whole pass.

        Raises:
            InputError: x, target or the code is not finite.
        """
        model = self.model
        variance, squares = self.backend.batch_sums(self.target)
        self.code = model.architecture.code(self.encoder, self.config, model.at)
        # What is 0 acts nowhere; but where activations are not ReLU's, it may have a gradient.
        on = self.code.acts != 0 if self.code.pre is None else torch.ones_like(self.code.idx, dtype=torch.bool)
        self.groups = self._grouped(self.code.idx, on)
        kept = model.architecture.observed(model.kept, self.code, self.norms, model.at, self.config)
        fired = self._fired()
        since = model.dead.unless(fired, len(self.x))
        dead_ids = self._look(variance, squares, self._dead(since))
        self.weights.settle_decoder(self.groups.latents)
        direct = Direct.of(model.architecture, self.x, self.weights.own_values())
        if direct is not None:
            self.target = self.target - direct.value.detach()

        grad, loss, fvu = self._reconstruct(with_auxk=dead_ids is not None)
        l0 = self._n_fired() / len(self.x)
        paid = None
        if self.code.pre is not None:
            weight = self.prefixes.weight[self.terms.main]
            paid = pay(model, self.target, self.code, self.groups, grad, l0, weight)
        parts: list[tuple[Code, Tensor]] = [(self.code, grad if paid is None else paid.grad_pre)]
        auxk: Number = 0.0
        if dead_ids is not None:
            part, auxk = self._auxk(dead_ids, grad)
            parts += [part] if part is not None else []
        loss = loss + self.config.auxk_coef * auxk
        own = {} if direct is None else direct.gradient(-2 * self.planes[0])
        seen = since, fired, kept, self.groups, len(self.x), self.error
        found = Gradient(*self._entries(parts), *seen, loss, fvu, auxk, l0, own)
        return found if paid is None else with_price(found, paid, self.weights.dense)

    def _served(self) -> Code:
        """The part of the code that the SAE serves."""
        return self.terms.part(self.code, self.terms.main)

    def _fired(self) -> Tensor:
        """(n_latents,) bool: which latents fired."""
        dead, served = self.model.dead, self._served()
        if self.config.fired_above != 0 or served is not self.code or served.pre is not None:
            return dead.fired(served)
        # The latents that fired are those that have a group.
        return self.groups.counts(self.n_latents) > 0

    def _n_fired(self) -> Number:
        """How many latents fired, over all tokens."""
        served = self._served()
        every = served is self.code and served.pre is None
        return self.groups.offsets[-1] if every else (served.acts > 0).sum().double()

    def _dead(self, since: Tensor) -> Tensor | None:
        """(n_latents,) bool: what AuxK may revive; None where there is no AuxK."""
        dead = self.model.dead
        return dead.mask(since if self.config.dead_update_first else dead.since) if self.config.auxk_coef else None

    def _look(self, variance: Number, squares: Number, dead: Tensor | None) -> Tensor | None:
        """The first wait for a GPU: refuses a batch before any row is settled, and counts what is dead.

        Returns:
            (n_dead,) ids for AuxK to revive, or None where it does not run.
        """
        hot, step = self.hot_latents, self.weights.step
        clashes: Number = hot.has(dead) if hot is not None and dead is not None else 0.0
        self.variance, squares, reach, widest, n_dead, clashing = fetched(
            variance, squares, self._reach(), self._widest(), 0.0 if dead is None else dead.sum(), clashes
        )
        if not 0 < self.variance <= squares * (1 + 1e-6) < OVERFLOW:
            raise not_finite(step, math.nan, self.x, self.target)
        if not (reach * widest) ** 2 * len(self.x) < OVERFLOW:
            raise not_finite(step, math.nan if math.isnan(reach) else math.inf, self.x, self.target)
        if clashing:
            self.hot_latents = None  # a latent's gradient has to come from one place
        return placed(dead, int(n_dead)) if dead is not None and auxk_runs(int(n_dead), self.config) else None

    def _reach(self) -> Number:
        """The largest activation: NaN or inf for a code that is not finite, 0-d."""
        acts, norms = self.code.acts, self.norms
        if acts.numel() == 0:
            return 0.0
        largest = acts.max()
        return (largest if norms is None else largest * norms.max()).double()

    def _widest(self) -> Number:
        """Entries of the token that has most."""
        if self.code.row_ptr is None:
            return float(self.code.idx.shape[1])
        return self.code.row_ptr.diff().max()

    def _grouped(self, idx: Tensor, keep: Tensor) -> Groups:
        found: Groups = self.backend.group_entries(idx.flatten(), keep.flatten(), self.n_latents)
        return found

    def _reconstruct(self, *, with_auxk: bool) -> tuple[Tensor, Number, Number]:
        """Decode and the reconstruction losses: the gradient to the code's activations, their value, and the FVU.

        Makes `planes` (P or P + 1, B, D), the weighted residuals; the last one is AuxK's to fill.
        """
        (B, D), P, main = self.target.shape, len(self.terms.prefixes), self.terms.main
        weight = term_weights(self.terms, self.target.shape, self.variance, self.config, self.model.mse_scale)
        self.prefixes = Prefixes(self.terms.bounds, weight, self.terms.by_latent, main)
        self.planes = self.model.scratch("planes", P + with_auxk, B, D)
        self.error = self.model.scratch("error", B, D) if with_auxk or self.model.wants_error else None
        grad, squares = self._decode()
        sums = [serial_sum(row) for row in squares]
        return grad, sum(w * s for w, s in zip(weight, sums, strict=True)), sums[main] / self.variance

    def _decode(self) -> tuple[Tensor, Tensor]:
        """decode_loss, with the hot latents taken out and done as matrix products."""
        W_dec, planes = self.weights.dec.w, self.planes[: len(self.terms.prefixes)]
        hot = self.hot = None if self.hot_latents is None else self.hot_latents.block(self.code.acts, self.code.idx)
        target, code = self.target, self.code
        if hot is not None:
            W_hot = W_dec[hot.ids].to(target.dtype)
            target = target - hot.acts @ W_hot
            code = code._replace(acts=torch.where(hot.is_hot, 0, code.acts))
        decoded = self.backend.decode_loss(
            target, code, W_dec, self.weights.b_dec, self.prefixes, planes, relu=code.pre is None, error=self.error
        )
        if hot is None:
            return decoded.grad_acts, decoded.squares
        self.grad_hot = (-2 * planes[0] @ W_hot.T) * (hot.acts > 0)
        there = self.grad_hot.gather(1, hot.slot)
        return torch.where(hot.is_hot, there, decoded.grad_acts), decoded.squares

    def _auxk(self, dead_ids: Tensor, grad: Tensor) -> tuple[tuple[Code, Tensor] | None, Number]:
        """AuxK: dead latents reconstruct the residual. Its part, if there is one, and its value without coef.

        Args:
            grad: dloss / dacts of the batch's own code.
        """
        assert self.error is not None
        config, plane, k = (
            self.config,
            self.planes[-1],
            min(auxk_wanted(self.target.shape[1], self.config), len(dead_ids)),
        )
        unexplained = self.backend.batch_sums(self.error)[0] if config.auxk_denominator == "residual" else 0.0
        weight = auxk_weight(self.error.shape, len(dead_ids), self.variance, unexplained, config)
        if k == 0:
            torch.mul(self.error, config.auxk_coef * weight, out=plane)
            return None, weight * self.backend.batch_sums(self.error)[1]
        if self._by_block(k, len(dead_ids)):
            self.aux = self._auxk_block(dead_ids, k, config.auxk_coef * weight, grad)
            return None, weight * serial_sum(self.aux.squares)
        code = self.encoder.topk(k, dead_ids, config.auxk_relu)
        self.weights.settle_decoder(self._grouped(code.idx, code.acts != 0).latents)
        prefixes = Prefixes([k], [config.auxk_coef * weight])
        decoded = self.backend.decode_loss(
            self.error, code, self.weights.dec.w, None, prefixes, plane[None], relu=config.auxk_relu
        )
        return (code, decoded.grad_acts), weight * serial_sum(decoded.squares[0])

    def _by_block(self, k: int, n_dead: int) -> bool:
        """Whether AuxK is done by matrix products. They know one reconstruction, and codes of a fixed width."""
        if self.weights.dense or len(self.terms.prefixes) > 1 or not (self._all_silent() or self.code.row_ptr is None):
            return False
        return auxk_block.pays_off(self.x, k, n_dead)

    def _all_silent(self) -> bool:
        """Whether no dead latent can be in the batch's own code.

        One that has just fired is not dead, if it was asked after that and if every activation counts as firing.
        """
        above = self.config.fired_above
        return self.config.dead_update_first and (above is None or above <= 0)

    def _auxk_block(self, dead_ids: Tensor, k: int, weight: Number, grad: Tensor) -> auxk_block.Block:
        """AuxK by matrix products, which take over the batch's own entries of dead latents if there may be any."""
        assert self.error is not None
        enc, dec = self.weights.enc, self.weights.dec
        # Ranked by the norms of before the rows are settled, as the batch's own code and the sparse form of AuxK are.
        norms = None if self.norms is None else self.norms.clone()
        self.weights.settle_decoder(dead_ids.int())
        encoder = auxk_block.Encoder(enc.w, self.weights.b_enc, dec.w, norms)
        code = None
        if not self._all_silent():
            code = auxk_block.Code(self.code.acts, self.code.idx, grad, self.planes[0])
        relu = self.config.auxk_relu
        return auxk_block.auxk_block(
            *(self.centred, self.error, self.planes[-1], encoder, dead_ids, k, weight), relu=relu, code=code
        )

    def _entries(
        self, parts: list[tuple[Code, Tensor]]
    ) -> tuple[Groups, RowGradient, RowGradient, list[BlockGradient], Tensor, Tensor]:
        """The parts as entries grouped by latent, the blocks' rows beside them, and the biases' gradients."""
        groups, taken, D = self.groups, self._taken(), self.target.shape[1]
        if taken or len(parts) > 1:
            keep = _joined([code.acts for code, _ in parts]) != 0
            for entries_of_block in taken:
                keep[: self.code.idx.numel()] &= ~entries_of_block.flatten()
            groups = self._grouped(_joined([code.idx for code, _ in parts]), keep)
        entries: Entries = self.backend.fill_entries(groups, parts, self.prefixes, self.n_latents)
        offsets = groups.over_all(self.n_latents) if self.weights.dense else groups.offsets
        planes, dec_row, rows, enc_row = self._sources(groups, entries)
        for_dec = RowGradient(planes.view(-1, D), offsets, dec_row, entries.dec_coef)
        for_enc = RowGradient(rows, offsets, enc_row, entries.enc_coef)
        b_enc, blocks = entries.grad_by_latent, []
        if self.hot is not None:
            b_enc[self.hot.ids] = self.grad_hot.sum(0)
            blocks.append(self._hot_rows(self.hot))
        if self.aux is not None:
            b_enc[self.aux.ids] = self.aux.b_enc
            blocks.append(BlockGradient(self.aux.ids.int(), self.aux.for_dec, self.aux.for_enc))
        touched = [groups.latents, *(block.ids for block in blocks)]
        return groups, for_dec, for_enc, blocks, b_enc, self._b_dec(b_enc, touched)

    def _sources(self, groups: Groups, entries: Entries) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rows that gradients are sums of, and which of them each entry takes: for W_dec, then for W_enc.

        Where latents read and write some columns alone, a row of x is the row of each block, one after the other, and a
        block has the residuals that are 0 in columns that it does not write: one plane for each, M (B, D) in all.
        """
        blocks = self.model.architecture.blocks()
        if len(blocks) == 1:
            return self.planes, entries.dec_row, self.centred, entries.enc_row
        M, B, each = len(blocks), len(self.x), self.n_latents // len(blocks)
        sizes = groups.offsets.diff().long()
        n = len(entries.enc_row)
        owner = (groups.latents.clamp_min(0) // each).repeat_interleave(sizes, output_size=n)
        planes = self.model.scratch("own columns", M, *self.target.shape)
        for plane, block in zip(planes, blocks, strict=True):
            plane.zero_()[:, block.writes] = self.planes[0][:, block.writes]
        rows = self.centred.reshape(B * M, -1)
        return planes, entries.dec_row + owner * B, rows, entries.enc_row * M + owner

    def _taken(self) -> list[Tensor]:
        """(B, K) bool masks of the code's entries that blocks have taken over."""
        found = [] if self.hot is None else [self.hot.is_hot]
        return found if self.aux is None or self.aux.taken is None else [*found, self.aux.taken]

    def _hot_rows(self, hot: Block) -> BlockGradient:
        return BlockGradient(hot.ids.int(), -2 * hot.acts.T @ self.planes[0], self.grad_hot.T @ self.centred)

    def _b_dec(self, b_enc: Tensor, touched: list[Tensor]) -> Tensor:
        """The gradient of b_dec (D,), from that of b_enc, which is 0 but for the latents touched."""
        grad: Tensor = -2 * self.backend.weighted_row_sum(self.planes[0])
        if self.config.auxk_b_dec_grad and len(self.planes) > len(self.terms.prefixes):
            grad -= 2 * self.backend.weighted_row_sum(self.planes[-1])
        if not self.is_centred:
            return grad
        # b_dec is subtracted from what the encoder sees: -Σ over entries of grad · W_enc row, latent by latent.
        for latents in touched:
            grad -= self.backend.weighted_row_sum(self.weights.enc.w, latents, b_enc[latents.long()])
        return grad


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0].flatten() if len(tensors) == 1 else torch.cat([t.flatten() for t in tensors])
