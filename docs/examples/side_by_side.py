"""What the example scripts share: rows to train on, a clock, and the two runs side by side."""

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    d_in: int
    n_latents: int
    k: int
    batch: int
    steps: int
    device: str


def sizes(description: str | None) -> Sizes:
    """From the command line; the defaults take a minute on two cores."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(d_in=256, n_latents=8192, k=32, batch=512, steps=30).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return Sizes(**vars(parser.parse_args()))


def rows(sizes: Sizes) -> list[Tensor]:
    """Batches (batch, d_in) of sparse sources of very different frequency, with noise and a mean."""
    g = torch.Generator(sizes.device).manual_seed(0)
    n, made = 4 * sizes.d_in, dict(generator=g, device=sizes.device)
    sources = torch.randn(n, sizes.d_in, **made) / sizes.d_in**0.5
    share = 0.2 * torch.arange(1, n + 1, device=sizes.device) ** -0.6
    found = []
    for _ in range(sizes.steps):
        code = torch.rand(sizes.batch, n, **made) * (torch.rand(sizes.batch, n, **made) < share)
        found.append(code @ sources * 10 + 0.1 * torch.randn(sizes.batch, sizes.d_in, **made) + 1.0)
    return found


@dataclass
class Run:
    """One training run: the loss of every step, and when each batch was taken."""

    losses: list[float] = field(default_factory=list)
    taken: list[float] = field(default_factory=list)

    def batches(self, rows: list[Tensor]) -> Iterator[Tensor]:
        """The rows, noting when a loop comes for the next ones."""
        for x in rows:
            self.note_time()
            yield x.clone()
        self.note_time()

    def note_time(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.taken.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of a step: the median over all but the first two, in which memory is taken."""
        return statistics.median(b - a for a, b in zip(self.taken[2:], self.taken[3:], strict=False))


def show(theirs: str, before: Run, after: Run) -> None:
    """Both loss curves, and the speed-up."""
    print(f"{'step':>6} {theirs:>20} {'saefast':>20}")
    for step in sorted({*range(0, len(before.losses), max(1, len(before.losses) // 10)), len(before.losses) - 1}):
        print(f"{step:>6} {before.losses[step]:>20.6f} {after.losses[step]:>20.6f}")
    apart = max(abs(a - b) / abs(a) for a, b in zip(before.losses, after.losses, strict=True))
    print(f"largest difference of the two curves: {apart:.1e} of the loss")
    print(f"seconds a step: {before.seconds:.4f} {theirs}, {after.seconds:.4f} saefast")
    print(f"speed-up: {before.seconds / after.seconds:.2f}")
