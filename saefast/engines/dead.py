"""DeadLatents: how long ago each latent fired."""

from typing import NamedTuple

import torch
from torch import Tensor

from saefast.engines.recipe import Recipe
from saefast.ops.code import Code


class Silent(NamedTuple):
    """Which part of the latents has been silent, and for how long."""

    share: Tensor
    """0-d: latents that fired on none of the last `tokens` tokens, over all latents."""
    tokens: int
    never: Tensor
    """0-d: latents that never fired, over all latents."""


class DeadLatents:
    """How long ago each latent fired, in tokens or in steps, and so which are dead.

    A counter starts at `dead_start`, grows by the batch's tokens (or by 1), goes back to 0 when its latent fires, and
    at `dead_after` the latent is dead. What counts as firing: `TrainConfig.fired_above`.

    Attributes:
        since: (n_latents,) int64 counters.
        never: (n_latents,) bool, which latents never fired. The counters do not tell where they begin below 0.
        age: (n_latents,) int64, how long ago each latent began, at the start or by being resampled; in the counters'
            unit.
    """

    def __init__(self, n_latents: int, config: Recipe, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.since = torch.full((n_latents,), config.dead_start, dtype=torch.int64, device=device)
        self.never = torch.ones(n_latents, dtype=torch.bool, device=device)
        self.age = torch.zeros(n_latents, dtype=torch.int64, device=device)

    def fired(self, code: Code) -> Tensor:
        """(n_latents,) bool: which latents fire in a batch's code."""
        n_latents, above = len(self.since), self.config.fired_above
        if above is None and code.row_ptr is not None:
            above = 0.0  # what was not selected is there as padding
        fired = code.idx if above is None else torch.where(code.acts > above, code.idx, n_latents)
        # One place more, for what did not fire: to leave it out would make the host count the rest.
        hit = self.since.new_zeros(n_latents + 1, dtype=torch.bool)
        return hit.index_fill_(0, fired.flatten().long(), True)[:-1]

    def unless(self, fired: Tensor, n_rows: int) -> Tensor:
        """The counters after a batch of n_rows in which the latents of fired (n_latents,) bool fired."""
        return (self.since + self.counted(n_rows)).masked_fill_(fired, 0)

    def take(self, since: Tensor, fired: Tensor, n_rows: int) -> None:
        """The counters of a batch of n_rows, as `unless` gave them, and what fired in it: once its step is sure."""
        self.since = since
        self.never.logical_and_(~fired)
        self.age += self.counted(n_rows)

    def counted(self, n_rows: int) -> int:
        """What a batch of so many rows adds to a counter."""
        return n_rows if self.config.dead_unit == "tokens" else 1

    def hopeless(self) -> Tensor:
        """(n_latents,) bool: dead, and not because they began a moment ago."""
        return self.mask(self.since) & self.mask(self.age)

    def tensors(self) -> dict[str, Tensor]:
        """What an engine's state holds of this, live."""
        return {"dead.since": self.since, "dead.never": self.never, "dead.age": self.age}

    def mask(self, since: Tensor) -> Tensor:
        """(n_latents,) bool: which latents these counters call dead."""
        return since >= self.config.dead_after

    def ids(self, since: Tensor) -> Tensor:
        """(n_dead,) ascending int64 ids of the latents that these counters call dead."""
        return self.mask(since).nonzero().squeeze(1)

    def share(self) -> Tensor:
        """Dead latents over all latents, 0-d."""
        return self.mask(self.since).float().mean()

    def silent(self, tokens: int) -> Silent:
        """What has been silent in a run of so many tokens so far, over a window that has passed: half of them, or
        dead_after where that is shorter; in whole batches."""
        batch = self.config.batch_size
        counted = 1 if self.config.dead_unit == "tokens" else batch
        batches = max(min(tokens // 2, self.config.dead_after * counted) // batch, 1)
        window = min(batches * batch, tokens)
        silent = self.never | (self.since >= (window if counted == 1 else batches))
        return Silent(silent.float().mean(), window, self.never.float().mean())
