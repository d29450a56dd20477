"""Ugly rows: what an SAE by the default recipe is worth on ordinary rows, beside one of the same rows without ugliness.

    python -m bench.ugly [--data runs/demo/activations] [--before] [--out DIR] [--quick]

Means far from zero, attention sinks, odd sizes, constant and copied dimensions, duplicates: each is put on the demo's
activations (`saefast demo` leaves them in runs/demo/activations) and on made rows, sums of a few directions. FVU and
the share of latents that fire on none are of held-out rows that are not sinks, in the dimensions there were before.
--before trains once more with the mean norm as the scale and nothing left out, which is what the default was.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import common
from saefast.data.opening import open_source
from saefast.engines.config import TrainConfig
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.training.api import train

DATA = common.ROOT / "runs" / "demo" / "activations"
TOKENS, HELD = 200_000, 16_384
RECIPE: dict[str, Any] = {}
BEFORE: dict[str, Any] = dict(normalize="sqrt_d", max_norm_multiple=None)
# FVU on ordinary rows against that of clean rows.
ALLOWED = 1.03
SINK_EVERY = 128


class Data(NamedTuple):
    """Clean rows to train on and held out, and the SAE they are given."""

    name: str
    train: Tensor
    held: Tensor
    n_latents: int
    k: int


def real(path: Path, tokens: int) -> Data:
    """Rows of a harvest, float32."""
    source = open_source(path)
    drawn = source.batches(8192)
    rows = torch.cat([next(drawn)["x"] for _ in range(-(-tokens // 8192))])
    held = torch.cat([batch["x"] for batch in source.heldout(8192)])[:HELD]
    return Data("real", rows, held, 2048, 32)


def made(tokens: int, d: int = 64) -> Data:
    """Sums of about 8 of 4·d directions, in sizes from 0 to 1."""
    drawn = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * d, d, generator=drawn), dim=1)

    def rows(n: int) -> Tensor:
        fires = torch.rand(n, 4 * d, generator=drawn) < 8 / (4 * d)
        return (fires * torch.rand(n, 4 * d, generator=drawn)) @ directions

    return Data("made", rows(tokens), rows(HELD), 512, 8)


Change = Callable[[Tensor], Tensor]


def cases(clean: Tensor) -> dict[str, Change]:
    """Ways to make rows ugly, whose measures are those of clean rows."""
    centre = clean.mean(0)
    spread = float((clean - centre).norm(dim=1).median())
    drawn = torch.Generator().manual_seed(1)
    towards = torch.nn.functional.normalize(torch.randn(clean.shape[1], generator=drawn), dim=0)
    two = torch.zeros_like(towards)
    two[[3, 17]] = 1.0

    def sinks(times: float) -> Change:
        def change(rows: Tensor) -> Tensor:
            rows = rows.clone()
            n = len(rows[::SINK_EVERY])
            rows[::SINK_EVERY] = centre + towards * times * spread * (1 + 0.01 * torch.randn(n, 1, generator=drawn))
            return rows

        return change

    found: dict[str, Change] = {"clean": lambda rows: rows}
    for times in (300, 1000, 3000):
        found[f"mean {times} x the spread"] = lambda rows, times=times: rows + towards * (times * spread)
    found["mean 3000 x the spread in two dimensions"] = lambda rows: rows + two * (3000 * spread)
    for times in (10, 100, 1000, 3000):
        found[f"1 row in {SINK_EVERY} at {times} x"] = sinks(times)
    found["rows x 1e-3"] = lambda rows: rows * 1e-3
    found["rows x 1e3"] = lambda rows: rows * 1e3
    found["8 constant dimensions"] = lambda rows: torch.cat([rows, torch.full((len(rows), 8), 5 * spread)], 1)
    found["8 copied dimensions"] = lambda rows: torch.cat([rows, rows[:, :8]], 1)
    found["and a fifth as many copies of 100 rows"] = with_copies
    return found


def with_copies(rows: Tensor) -> Tensor:
    """All rows, and beside them copies of the first hundred, so that nothing is missing."""
    return torch.cat([rows, rows[:100].repeat(len(rows) // 500, 1)])


def one(data: Data, name: str, changes: dict[str, Any], device: str) -> dict[str, Any]:
    """Trains on rows made ugly in one way, and measures on held-out rows made ugly in the same way."""
    change = cases(data.train)[name]
    rows = change(data.train)
    config = TrainConfig(n_tokens=len(rows), device=device, save_every=0, **(RECIPE | changes))
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = train(rows, SAEConfig(d_in=rows.shape[1], n_latents=data.n_latents, k=data.k), config, progress=False)
    held = data.held if change is with_copies else change(data.held)
    fvu, silent = measure(sae, held, data.held.shape[1])
    return {"fvu": fvu, "silent": silent, "seconds": time.perf_counter() - begin}


@torch.no_grad()
def measure(sae: SAE, held: Tensor, d: int) -> tuple[float, float]:
    """FVU over the first d dimensions of rows that are no sinks, and the share of latents that fire on none of them."""
    held = held[torch.arange(len(held)) % SINK_EVERY != 0]
    fired, error = torch.zeros(sae.config.n_latents, dtype=torch.bool), 0.0
    for x in held.split(4096):
        x_hat, acts, idx = sae(x.to(sae.device))
        fired[idx[acts > 0].long().cpu()] = True
        error += float((x_hat.cpu() - x)[:, :d].double().square().sum())
    there = held[:, :d].double()
    return error / float((there - there.mean(0)).square().sum()), 1 - float(fired.double().mean())


def line(data: Data, name: str, runs: dict[str, dict[str, Any]], clean: dict[str, Any]) -> dict[str, Any]:
    """Of the default, against clean rows, and of what it was before where that was run."""
    found, before = runs["default"], runs.get("before")
    return {
        "rows": data.name,
        "case": name,
        "FVU": round(found["fvu"], 4),
        "against clean": f"{found['fvu'] / clean['fvu'] - 1:+.1%}",
        "silent": f"{found['silent']:.1%}",
        "FVU before": None if before is None else round(before["fvu"], 4),
        "silent before": None if before is None else f"{before['silent']:.1%}",
        "seconds": round(found["seconds"], 1),
    }


def compared(data: Data, device: str, variants: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a case, printed as they come."""
    lines, clean = [], None
    for name in cases(data.train):
        runs = {variant: one(data, name, changes, device) for variant, changes in variants.items()}
        clean = clean or runs["default"]
        lines.append(line(data, name, runs, clean))
        print({key: value for key, value in lines[-1].items() if value is not None}, flush=True)
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    options = common.arguments(
        "bench.ugly", __doc__, argv, data=dict(type=Path, default=DATA), before=dict(action="store_true")
    )
    tokens = 20_000 if options.quick or options.rehearse else TOKENS
    every = [made(tokens)]
    if (options.data / "index.json").exists():
        every.insert(0, real(options.data, tokens))
    else:
        print(f"{options.data} is not there: made rows alone")
    variants = {"default": {}} | ({"before": BEFORE} if options.before else {})
    lines = [line for data in every for line in compared(data, options.device, variants)]
    print()
    common.print_table(lines)
    common.write_results(options.out, options.device, "ugly", lines)
    worse = [line["case"] for line in lines if 1 + float(line["against clean"].rstrip("%")) / 100 > ALLOWED]
    if worse and tokens == TOKENS:
        raise SystemExit(f"worse than clean rows by more than {ALLOWED - 1:.0%}: {', '.join(worse)}")


if __name__ == "__main__":
    main()
