"""The rows that latents begin anew at where these are inputs, as published: drawn with probability ∝ loss².

Bricken et al. (2023, "Towards Monosemanticity", appendix): at some steps, 819,200 inputs are gone through; a dead
latent's decoder row becomes one of them at unit norm, its encoder row the same at 0.2 times the mean norm of those
alive, its bias and Adam's moments 0.

Here no row is read twice: the last batches before such a step are drawn from as they go by. Of a row the loss is its
squared error, by the weights of its own step; and no row is drawn twice. The draw is that of Efraimidis and Spirakis
(2006): a row gets the key log(u) / loss², u uniform, and the largest keys are kept. Which these are does not depend on
how many more are kept along the way, so that a resumed run draws the same.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saefast.engines.resample import Fresh
from saefast.errors import InputError
from saefast.models.architecture import Block

# The norm of an encoder row that begins anew, over the mean of those alive.
ENCODER_NORM = 0.2
NAMES = ("draw.keys", "draw.x", "draw.target")


class Draw:
    """Rows of the last batches, by the largest keys.

    Attributes:
        rows: None, or keys (n,) float64 descending, x (n, d_in) and targets (n, d_out) of the rows.
    """

    def __init__(self) -> None:
        self.rows: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, x: Tensor, target: Tensor, residual: Tensor, most: int, seed: int, step: int) -> None:
        """A batch goes by.

        Args:
            x: (B, d_in). target, residual: (B, d_out).
            most: rows that may be asked for in the end.
            seed, step: what the batch's part of the draw depends on.
        """
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        u = torch.rand(len(x), generator=generator, dtype=torch.float64, device="cpu").to(x.device)
        # Of one that is all zeros no latent could be made.
        weight = residual.double().square().sum(1).square() * (x != 0).any(1)
        keys = torch.where(weight > 0, u.log() / weight, -torch.inf)
        new = keys, x, target
        every = new if self.rows is None else tuple(torch.cat(pair) for pair in zip(self.rows, new, strict=True))
        best = every[0].topk(min(most, len(every[0])))
        self.rows = best.values, every[1][best.indices], every[2][best.indices]

    def take(self, blocks: tuple[Block, ...], hopeless: Tensor, alive: Tensor, W_enc: Tensor) -> Fresh | None:
        """What the hopeless latents (L,) bool begin anew with; nothing is left of the draw then.

        Args:
            blocks: `Architecture.blocks`.
        """
        rows, self.rows = self.rows, None
        ids = hopeless.nonzero().squeeze(1)
        if rows is None or len(ids) == 0 or not alive.any():
            return None
        keys, x, target = rows
        n = min(len(ids), int((keys > -torch.inf).sum()))
        if n == 0:
            return None
        ids, x, target = ids[:n], x[:n].float(), target[:n].float()
        enc, dec = x.new_zeros(n, W_enc.shape[1]), torch.zeros_like(target)
        for own, reads, writes in blocks:
            mine = ((ids >= own.start) & (ids < own.stop)).nonzero().squeeze(1)
            enc[mine] = normalize(x[mine][:, reads], dim=1)
            dec[mine, writes] = normalize(target[mine][:, writes], dim=1)
        norm = ENCODER_NORM * W_enc[alive].float().norm(dim=1).mean()
        return Fresh(ids, norm * enc, dec, torch.zeros_like(dec[:, 0]), True)

    def tensors(self) -> dict[str, Tensor]:
        """What an engine's state holds of this: nothing, or three tensors."""
        return {} if self.rows is None else dict(zip(NAMES, self.rows, strict=True))

    def load(self, state: dict[str, Tensor | int | float], x: Tensor, target: Tensor) -> None:
        """Takes back `tensors`.

        Args:
            x, target: (0, d_in) and (0, d_out) of the dtype and on the device that rows are to be.

        Raises:
            InputError: a tensor is missing, or of another shape or dtype.
        """
        found = [state.get(name) for name in NAMES]
        if all(value is None for value in found):
            self.rows = None
            return
        keys, *rows = found
        n = len(keys) if isinstance(keys, Tensor) and keys.dim() == 1 else -1
        for name, value, like in zip(NAMES[1:], rows, (x, target), strict=True):
            if not isinstance(value, Tensor) or value.shape != (n, like.shape[1]) or value.dtype != like.dtype:
                raise InputError(f"state: {name} is not the rows that {NAMES[0]} is of; it belongs to another config")
        assert isinstance(keys, Tensor)
        self.rows = keys.to(x.device), rows[0].to(x.device), rows[1].to(x.device)  # type: ignore[union-attr]
