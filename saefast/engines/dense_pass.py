"""A batch's forward and backward pass over all latents, chunk by chunk: for pointwise architectures with many on.

A ReLU SAE begins with half of its latents on in every token. A list of so many entries costs far more than the matrix
products that it saves, and takes more memory than B · L numbers. So the products are done, for a chunk of latents at a
time: a first round makes the reconstruction; a second one, from the residual, the gradient rows of each chunk, which
are used by their update and forgotten. The maths is that of `fused_pass`, and so is the order of things: the first
round writes nothing but settled decoder rows, and only after it is the loss known to be finite.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saefast.engines.derived import Direct, Elements, derived
from saefast.engines.engine import not_finite
from saefast.engines.gradient import OVERFLOW, BlockGradient, Model, fetched, serial_sum
from saefast.engines.losses import term_weights
from saefast.models.architecture import Architecture, Layer
from saefast.models.pointwise import Pointwise, gathered
from saefast.optim.dispatch import row_ops

# The share of all B · L entries above which this is faster than the list of them. On two cores of an EPYC the two meet
# at 0.14, 0.17 and 0.19 for D = 128, 384 and 768 (B = 1024, fp32).
PAYS_OFF = 0.17
# A list longer than that is not made, faster or not: with its groups and gradients an entry takes some 50 bytes.
ENTRIES = 1 << 24
# Numbers of a chunk of pre-activations, (B, C) of them. Some five times that is held at the worst moment.
CHUNK = 1 << 21
# Bytes up to which all pre-activations are kept from the first round to the second, which makes them again otherwise.
KEPT = 1 << 26
# Fewer latents than that make products too narrow, whatever the batch.
LEAST = 128


def serves(architecture: Architecture) -> bool:
    """Whether an architecture can be trained so: a pointwise one that asks no more of a batch's code than its L0, and
    whose latents read all of x."""
    if len(architecture.blocks()) > 1:
        return False
    while isinstance(architecture, Layer):
        if type(architecture).observed is not Layer.observed:
            return False
        architecture = architecture.inner
    return isinstance(architecture, Pointwise) and type(architecture).observed is Pointwise.observed


class Chunk(NamedTuple):
    """Latents begin to end (exclusive), all of one prefix's."""

    begin: int
    end: int
    prefix: int

    @property
    def latents(self) -> slice:
        return slice(self.begin, self.end)


@dataclass
class Forward:
    """What the first round finds; names as in `gradient.Gradient`."""

    since: Tensor
    fired: Tensor
    kept: dict[str, Tensor]
    rows: int
    error: Tensor | None
    loss: float
    fvu: float
    l0: float
    penalty: float
    coefficient: float
    share: float
    """Of all B · L entries, those above the architecture's limit."""


@dataclass
class Few:
    """The gradients that come in no rows."""

    b_enc: Tensor
    """(L,)."""
    b_dec: Tensor
    """(D,)."""
    own: dict[str, Tensor]


@dataclass
class Sums:
    """Over all latents, as the first round goes through their chunks. On the device, so that the host waits once."""

    fired: Tensor
    """(L,) bool."""
    on: Tensor
    """(B,) int64 entries above the limit."""
    active: Tensor
    """0-d int64: activations above 0."""
    penalty: Tensor
    """0-d float64, without its coefficient."""
    everywhere: Tensor
    """0-d float64, of what is paid on every token."""
    reach: Tensor
    """0-d, the largest activation."""


class DensePass:
    """One batch x (B, D) going through a model, to reconstruct target (B, D_out).

    Call `forward`; then, as often as its gradient is wanted, go through `blocks` and take `few` after the last.
    """

    def __init__(self, model: Model, x: Tensor, target: Tensor) -> None:
        rule = model.architecture.pointwise
        assert rule is not None
        self.model, self.rule, self.x, self.target = model, rule, x, target
        self.config, self.weights = model.config, model.weights
        self.terms = model.architecture.terms(model.config, model.at)
        self.backend, self.L = row_ops(x), len(model.weights.enc.w)
        self.is_centred = self.weights.sae.config.apply_b_dec_to_input
        self.centred = x - self.weights.b_dec if self.is_centred else x
        self.own = self.weights.own_values() | {"b_enc": self.weights.b_enc}
        self.limit = rule.limit(self.weights.own_values(), model.config)
        self.chunks = chunks(len(x), self.L, self.terms.bounds)
        self.keeps = len(x) * self.L * x.element_size() <= KEPT
        self.made: dict[int, Tensor] = {}

    def forward(self) -> Forward:
        """The first round.

        Raises:
            InputError: x, target, an activation or the loss is not finite.
        """
        model, B = self.model, len(self.x)
        self._look_at_data()
        if self._writes():
            # All activations are looked at before the first row is written.
            self._check(self._sums(reconstructs=False))
            self.weights.settle_decoder(torch.arange(self.L, dtype=torch.int32, device=self.x.device))
        direct = Direct.of(model.architecture, self.x, self.weights.own_values())
        if direct is not None:
            self.target = self.target - direct.value.detach()

        sums = self._sums(reconstructs=True)
        on, active, penalty, everywhere = self._check(sums)
        loss, fvu = self._losses()
        self.past = {} if direct is None else direct.gradient(-2 * self.planes[0])
        l0 = active / B
        self.coefficient = float(self.rule.coefficient(model.at, model.kept, l0, self.config))
        paid = float(self.rule.charged(self.coefficient, penalty / B, self.config)) + everywhere / B
        if not abs(loss := loss + paid) < torch.inf:
            raise not_finite(self.weights.step, loss, self.x, self.target)
        kept = model.kept | self.rule.counted(model.kept, l0, model.at, self.config)
        seen = model.dead.unless(sums.fired, B), sums.fired, kept, B, self.error
        return Forward(*seen, loss, fvu, l0, paid, self.coefficient, on / (B * self.L))

    def blocks(self) -> Iterator[BlockGradient]:
        """The second round: gradient rows of one chunk after the other, whose rows may be written before the next."""
        b_enc, own = torch.zeros_like(self.own["b_enc"]), {n: torch.zeros_like(v) for n, v in self._owned().items()}
        b_dec = -2 * self.backend.weighted_row_sum(self.planes[0])
        for chunk in self.chunks:
            ids, at = torch.arange(*chunk[:2], dtype=torch.int32, device=self.x.device), chunk.latents
            for_dec, found = self._chunk_gradient(chunk)
            for_enc = found.pre.T @ self.centred
            by_pre = found.pre.sum(0)
            if self.is_centred:
                # b_dec is subtracted from what the encoder sees.
                b_dec -= by_pre @ self.weights.enc.w[at].to(self.x.dtype)
            b_enc[at] = by_pre + found.own["b_enc"]
            for name, grad in own.items():
                grad[at] = found.own[name]
            yield BlockGradient(ids, for_dec, for_enc)
        self.few = Few(b_enc, b_dec, own | self.past)

    def _owned(self) -> dict[str, Tensor]:
        """The architecture's own parameters that hold a number for each latent."""
        return {name: value for name, value in self.own.items() if value.dim() == 1 and name != "b_enc"}

    def _look_at_data(self) -> None:
        """Refuses a batch that no sum of squares holds, and takes the target's variance."""
        self.variance, squares, of_x = fetched(
            *self.backend.batch_sums(self.target), self.backend.batch_sums(self.x)[1]
        )
        if not (0 < self.variance <= squares * (1 + 1e-6) < OVERFLOW and of_x < OVERFLOW):
            raise not_finite(self.weights.step, float("nan"), self.x, self.target)

    def _writes(self) -> bool:
        """Whether decoder rows have to be written before they are read."""
        late = not self.weights.dense and bool((self.weights.dec.last_step < self.weights.step).any())
        return late or self.config.decoder_norm == "pre_forward"

    def _check(self, sums: "Sums") -> list[float]:
        """Entries above the limit, activations above 0, and both penalties: on the host, once they are sure."""
        widest, reach, *found = fetched(
            sums.on.max(), sums.reach, sums.on.sum(), sums.active, sums.penalty, sums.everywhere
        )
        if not (reach * widest) ** 2 * len(self.x) < OVERFLOW:
            raise not_finite(self.weights.step, reach, self.x, self.target)
        return found

    def _sums(self, *, reconstructs: bool) -> Sums:
        """One round over all chunks; with `reconstructs` it makes the planes' reconstructions."""
        B, new = len(self.x), self.x.new_zeros
        sums = Sums(
            new(self.L, dtype=torch.bool), new(B, dtype=torch.int64), new((), dtype=torch.int64),
            new((), dtype=torch.float64), new((), dtype=torch.float64), new(()),
        )  # fmt: skip
        if reconstructs:
            self._begin_planes()
        for chunk in self.chunks:
            pre, at = self._pre(chunk), chunk.latents
            own = gathered(self.own, at)
            acts = self.rule.activate(pre, own)
            limit = self.limit[at] if isinstance(self.limit, Tensor) and self.limit.dim() else self.limit
            on, above = pre > limit, self.config.fired_above or 0.0
            sums.on += on.sum(1)
            sums.active += (acts > 0).sum()
            # An entry that does not act may count, but not what is no entry.
            sums.fired[at] = (acts > above if above >= 0 else on).any(0)
            sums.reach = torch.maximum(sums.reach, acts.amax())
            if reconstructs:
                self._reconstruct(chunk, acts, self.rule.frozen(pre, own))
                norms = self._norms(chunk, self._decoder(chunk))
                sums.penalty += self.rule.penalty(pre, acts, own, norms, self.config).sum()
                if (everywhere := self.rule.everywhere(pre, own, norms, self.config)) is not None:
                    sums.everywhere += everywhere.sum()
        return sums

    def _begin_planes(self) -> None:
        shape = self.target.shape
        self.planes = self.model.scratch("planes", len(self.terms.prefixes), *shape).zero_()
        self.error = self.model.scratch("error", *shape) if self.model.wants_error else None
        self.again: Tensor | None = None

    def _reconstruct(self, chunk: Chunk, acts: Tensor, frozen: Tensor | None) -> None:
        """Adds what a chunk decodes to: to the plane of its prefix, and to the second reconstruction."""
        W_dec = self._decoder(chunk)
        self.planes[chunk.prefix].addmm_(acts, W_dec)
        if frozen is not None:
            if self.again is None:
                self.again = self.model.scratch("frozen", *self.target.shape).zero_()
            self.again.addmm_(frozen, W_dec)

    def _losses(self) -> tuple[float, float]:
        """Makes weighted residuals of the reconstructions. -> The reconstruction losses, and the FVU."""
        weight = term_weights(self.terms, self.target.shape, self.variance, self.config, self.model.mse_scale)
        loss, fvu, x_hat = 0.0, 0.0, self.weights.b_dec.to(self.x.dtype)
        for p, w in enumerate(weight):
            x_hat = x_hat + self.planes[p]
            error = torch.sub(self.target, x_hat, out=self.planes[p])
            squares = sum_squares(error)
            loss += float(w * squares)
            if p == self.terms.main:
                fvu = squares / self.variance
                if self.error is not None:
                    self.error.copy_(error)
            error *= w
        for p in reversed(range(len(weight) - 1)):
            self.planes[p] += self.planes[p + 1]
        if self.again is not None:
            again = torch.sub(self.target - self.weights.b_dec, self.again, out=self.again)
            loss += float(weight[self.terms.main] * sum_squares(again))
            again *= weight[self.terms.main]
        return loss, fvu

    def _chunk_gradient(self, chunk: Chunk) -> tuple[Tensor, "ChunkGradient"]:
        """Of a chunk: the gradient rows of W_dec, and what goes on to the encoder."""
        W_dec, plane = self._decoder(chunk), self.planes[chunk.prefix]
        pre, own, norms = self._pre(chunk), gathered(self.own, chunk.latents), self._norms(chunk, W_dec)
        grad_acts = torch.mm(plane, W_dec.T).mul_(-2)
        again = None if self.again is None else torch.mm(self.again, W_dec.T).mul_(-2)
        each, given = 1 / len(self.x), Elements(pre, own, norms)
        found = derived(self.rule, given, grad_acts, again, self.coefficient * each, self.config, each)
        for_dec = torch.mm(found.acts.T, plane).mul_(-2)
        if found.norms is not None and norms is not None:
            _add_along(for_dec, W_dec, found.norms, self.model.architecture)
        return for_dec, ChunkGradient(found.pre, found.own)

    def _pre(self, chunk: Chunk) -> Tensor:
        """(B, C) the chunk's pre-activations, made again where not all are kept."""
        found = self.made.get(chunk.begin)
        if found is None:
            name = f"pre {chunk.begin}" if self.keeps else f"pre of {chunk.end - chunk.begin}"
            found, at = self.model.scratch(name, len(self.x), chunk.end - chunk.begin), chunk.latents
            torch.addmm(self.own["b_enc"][at], self.centred, self.weights.enc.w[at].to(self.x.dtype).T, out=found)
            if self.keeps:
                self.made[chunk.begin] = found
        return found

    def _decoder(self, chunk: Chunk) -> Tensor:
        """(C, D_out) the chunk's decoder rows, in the dtype of sums."""
        return self.weights.dec.w[chunk.latents].to(self.x.dtype)

    def _norms(self, chunk: Chunk, W_dec: Tensor) -> Tensor | None:
        """(C,) of the chunk's decoder rows, where the penalty depends on them."""
        return self.model.architecture.norms(W_dec).sum(1) if self.rule.wants_norms(self.config) else None


class ChunkGradient(NamedTuple):
    pre: Tensor
    """(B, C)."""
    own: dict[str, Tensor]
    """(C,) each."""


def chunks(B: int, n_latents: int, bounds: list[int]) -> list[Chunk]:
    """All latents in chunks of at most CHUNK numbers for B rows, none across a bound; of no less than LEAST latents."""
    width, found, begin = max(CHUNK // max(B, 1), LEAST), [], 0
    for prefix, bound in enumerate(bounds):
        while begin < min(bound, n_latents):
            end = min(begin + width, bound, n_latents)
            found.append(Chunk(begin, end, prefix))
            begin = end
    return found


def _add_along(grad: Tensor, W_dec: Tensor, by_norm: Tensor, architecture: Architecture) -> None:
    """Adds to decoder rows' gradient (C, D_out) what comes by their norms (C,): along the rows, block by block."""
    norms = architecture.norms(W_dec)
    along = by_norm[:, None] / torch.where(norms > 0, norms, 1)
    blocks = (*norms.shape, -1)
    grad.view(blocks).addcmul_(along[:, :, None], W_dec.view(blocks))


def sum_squares(error: Tensor) -> float:
    """Σ error², added in float64 on the CPU and in an order that the number of threads does not change."""
    return float(serial_sum(error.square().sum(1)))
