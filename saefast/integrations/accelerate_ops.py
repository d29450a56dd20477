"""The codes of accelerated objects: chosen by saefast's ops, differentiable, dense where an interface asks for that.

In all of this W_enc and W_dec are (L, D), x is (B, D), and a code is acts (B, K) with idx (B, K) int32.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saefast import ambient
from saefast.integrations.accelerate_gradients import chosen, decoded, room_for
from saefast.ops.code import Code, padded
from saefast.ops.encode_batch_topk import encode_batch_topk
from saefast.ops.encode_group_max import encode_group_max
from saefast.ops.encode_topk import encode_topk
from saefast.ops.mixed import encode_topk_mixed, pays_off
from saefast.ops.threshold_encode import threshold_encode

# Rows of a batch for which a bf16 copy of W_enc, made anew, costs less than it saves.
ROWS_FOR_MIXED = 256
# Rows that are looked at before a threshold's code is made, and the share of latents up to which such a code is sparse.
PROBED, SPARSE = 32, 1 / 32


class Encoder(NamedTuple):
    """A batch and the weights that it meets.

    Attributes:
        scale: (L,) what pre-activations are multiplied by where they are ranked, or None. Gets no gradient.
        low: the copy of W_enc in bf16 that chooses candidates, or None.
    """

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    scale: Tensor | None = None
    low: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None = None, *, mixed: bool) -> "Encoder":
        """
        Args:
            mixed: let bf16 choose candidates where that is faster. The copy is made of the weights as they are now,
                with every batch: nothing is kept that a write to .data could make wrong.
        """
        low = None
        if mixed and len(x) >= ROWS_FOR_MIXED and x.dtype == W_enc.dtype and pays_off(W_enc):
            low = _rounded(W_enc)
        return cls(x, W_enc, b_enc, None if scale is None else scale.detach(), low)

    @ambient.plainly()
    def topk(self, k: int, latents: Tensor | None = None, *, relu: bool = True, clip: bool = True) -> Code:
        """The k best of each row, as `saefast.ops.encode_topk`, differentiable.

        Args:
            latents: (n,) ascending ids, which alone compete.
            clip: False lets gradients through where ReLU clipped.
        """
        options: dict[str, Any] = dict(latents=latents, scale=self.scale, relu=relu)
        with torch.no_grad():
            if self.low is None:
                code = Code(*encode_topk(self.x, self.W_enc, self.b_enc, k, **options))
            else:
                code = Code(*encode_topk_mixed(self.x, self.low, self.W_enc, self.b_enc, k, **options))
        return code._replace(acts=self._differentiable(code, clip=relu and clip))

    @ambient.plainly()
    def group_max(self, k: int, *, clip: bool = True) -> Code:
        """The largest of each of k equal groups of latents."""
        with torch.no_grad():
            code = Code(*encode_group_max(self.x, self.W_enc, self.b_enc, k, scale=self.scale, W_low=self.low))
        return code._replace(acts=self._differentiable(code, clip=clip))

    @ambient.plainly()
    def batch_topk(self, n: int) -> Code:
        """The n best of the batch that are positive, with as many places a row as the fullest needs."""
        B = len(self.x)
        if n == 0 or B == 0:
            return Code(self.x.new_zeros(B, 0), torch.zeros(B, 0, dtype=torch.int32, device=self.x.device))
        with torch.no_grad():
            found = encode_batch_topk(self.x, self.W_enc, self.b_enc, -(-n // B), scale=self.scale, W_low=self.low)
            code = padded(self._best(found, n), len(self.W_enc))
        return code._replace(acts=self._differentiable(code))

    def _best(self, code: Code, n: int) -> Code:
        """The n best entries of a CSR code; others become 0, which is what an entry that is off is."""
        if n >= len(code.acts):
            return code
        rank = code.acts if self.scale is None else code.acts * self.scale[code.idx.long()]
        # Entries lie row by row, best first: a stable order gives ties to the first row.
        off = rank.argsort(descending=True, stable=True)[n:]
        return code._replace(acts=code.acts.index_fill(0, off, 0.0))

    @ambient.plainly()
    def above(self, limit: Tensor | float, *, positive: bool = True) -> Code | None:
        """All that is above a limit, one number or (L,) numbers; None where that is so much that dense products win.

        Args:
            positive: acts are ReLU's; else they are the pre-activations, and the code has `pre`, of 1 where an entry is
                one and 0 in places that a row leaves over.
        """
        parts = self.x, self.W_enc, self.b_enc
        with torch.no_grad():
            if len(self.x) > PROBED:
                # Spread over the batch, whose first rows may all be of one kind.
                step = torch.arange(PROBED, dtype=torch.int64, device=self.x.device)
                rows = step * len(self.x) // PROBED
                if self._is_dense(threshold_encode(self.x[rows], self.W_enc, self.b_enc, limit)[0]):
                    return None
            row_ptr, idx, acts = threshold_encode(*parts, limit)
            if self._is_dense(row_ptr):
                return None
            code = padded(Code(acts, idx, row_ptr.int(), torch.ones_like(acts)), len(self.W_enc))
        return code._replace(acts=self._differentiable(code, clip=positive), pre=None if positive else code.pre)

    def _is_dense(self, row_ptr: Tensor) -> bool:
        """Whether the fullest row of a code has too many entries: rows are filled up to it."""
        return len(row_ptr) > 1 and int(row_ptr.diff().max()) > max(1, SPARSE * len(self.W_enc))

    def _differentiable(self, code: Code, clip: bool = True) -> Tensor:
        return chosen(self.x, self.W_enc, self.b_enc, code, clip=clip).to(self.x.dtype)

    def dense(self) -> Tensor:
        """(B, L) pre-activations, for those who read them."""
        return self.x @ self.W_enc.T + self.b_enc


def _rounded(W: Tensor) -> Tensor:
    """A copy in bf16."""
    if W.device.type != "cpu":
        return W.detach().to(torch.bfloat16)
    with torch.no_grad():
        return room_for(W, torch.bfloat16).copy_(W)


@ambient.plainly()
def decode(code: Code, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """(B, D) reconstruction, differentiable in acts, W_dec and b_dec."""
    found = decoded(code, W_dec)
    return found if b_dec is None else found + b_dec


def norms_of(W_dec: Tensor) -> Tensor:
    """(L,) norms of the decoder's rows."""
    return W_dec.norm(dim=-1)


def times(code: Code, factors: Tensor) -> Code:
    """The code with each activation multiplied by its latent's factor (L,)."""
    return code._replace(acts=code.acts * factors[code.idx.long()].to(code.acts.dtype))


def between(code: Code, first: int, last: int) -> Code:
    """The entries of latents first .. last - 1; the others become 0."""
    inside = (code.idx >= first) & (code.idx < last)
    return code._replace(acts=torch.where(inside, code.acts, 0))


def nested(code: Code, W_dec: Tensor, b_dec: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """The reconstruction (B, D) from each prefix of latents; widths ascend."""
    found, begin = [], 0
    x_hat: Tensor = b_dec
    for end in widths:
        x_hat = decode(between(code, begin, end), W_dec) + x_hat
        found.append(x_hat)
        begin = end
    return found


def dense(code: Code, n_latents: int) -> Tensor:
    """(B, L) activations, 0 where a latent is off."""
    shape, dtype, device = (code.idx.shape[0], n_latents), code.acts.dtype, code.acts.device
    return torch.zeros(shape, dtype=dtype, device=device).scatter_(1, code.idx.long(), code.acts)


def sparse(code: Code, n_latents: int) -> Tensor:
    """The same as a sparse COO tensor."""
    row = torch.arange(code.idx.shape[0], device=code.idx.device)[:, None].expand_as(code.idx)
    where = torch.stack([row.flatten(), code.idx.flatten().long()])
    return torch.sparse_coo_tensor(where, code.acts.flatten(), (code.idx.shape[0], n_latents), check_invariants=False)


def marked(dense: Tensor, code: Code) -> Tensor:
    """A dense tensor (..., L) that remembers which code it is made of."""
    dense._saefast_code = Code(code.acts.detach(), code.idx)  # type: ignore[attr-defined]
    return dense


def code_of(acts: Tensor) -> Code | None:
    """The code of dense activations (..., L) that an accelerated object returned, if they are still that very code.

    None also where a gradient is to flow through them: of a dense tensor every place has one, also where it is 0.
    """
    code: Code | None = getattr(acts, "_saefast_code", None)
    if code is None or (torch.is_grad_enabled() and acts.requires_grad):
        return None
    flat = acts.reshape(-1, acts.shape[-1])
    # Someone may have written to it, .data included: compare rather than count writes.
    same = torch.equal(flat.gather(1, code.idx.long()), code.acts)
    return code if same and int(flat.count_nonzero()) == int(code.acts.count_nonzero()) else None
