"""Steering on a real language model: how far it goes, how exact it is, and what it costs, on `saefast demo --lm`'s run.

    python -m bench.steering [--run runs/demo-lm] [--latents 6] [--tokens 3072] [--out DIR]

Goes: the latents whose firing says most of the next token are set, at other tokens, to multiples of their largest
activation. The figure is the share of KL(p ‖ q) that is gone, p being the mean next-token distribution where the latent
fires by itself, q the mean at the steered tokens; beside it that of random directions which move every token as far.
Costs: processor time of a token that `generate` writes, with and without, the ways taking turns.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import saefast
from bench import common
from saefast.analysis.evaluation import load_finished
from saefast.data.shards import ShardFolder
from saefast.harvest.harvested_model import causal_language_model
from saefast.integrations.passes import Pass
from saefast.integrations.sites import Site, at_sites, find_sites
from saefast.integrations.steering import Steering
from saefast.models.calibration import as_jumprelu
from saefast.models.sae import SAE

RUN = common.ROOT / "runs" / "demo-lm"
LENGTH, BATCH = 128, 4
MULTIPLES = (1.0, 2.0, 4.0)
# A latent that may be chosen fires on this share of tokens.
DENSITY = (0.002, 0.01)
CANDIDATES = 64


def batches(folder: ShardFolder, tokens: int, skip: int = 0) -> Iterator[Tensor]:
    """(BATCH, LENGTH) ids: the beginnings of the harvest's sequences that are long enough, from the last one back."""
    long = (folder.tokens(seq) for seq in reversed(range(folder.n_sequences)))
    texts = [ids[:LENGTH].long() for ids in long if len(ids) >= LENGTH][: (tokens + skip) // LENGTH]
    yield from torch.stack(texts[skip // LENGTH :]).split(BATCH)


def next_tokens(model: Any, ids: Tensor) -> Tensor:
    """(B, LENGTH, V) distributions."""
    return model(input_ids=ids, use_cache=False).logits.float().softmax(-1)


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(p ‖ q) of two distributions (V,), in nats."""
    return float((p * (p.clamp_min(1e-30).log() - q.clamp_min(1e-30).log())).sum())


def where_latents_fire(model: Any, sae: SAE, ids: Sequence[Tensor], n: int) -> dict[int, Tensor]:
    """The n latents after which the next token differs most from usual, and the mean distribution (V,) after each."""
    counts = torch.zeros(sae.config.n_latents, dtype=torch.int64)
    codes = []
    for batch in ids:
        with saefast.encode(model, sae) as found:
            model(input_ids=batch, use_cache=False)
        acts, idx = next(iter(found.values()))
        codes.append((acts[:, 1:], idx[:, 1:].long()))  # without the first token, a sink
        counts += torch.bincount(codes[-1][1][codes[-1][0] > 0], minlength=len(counts))
    total = sum(acts.shape[0] * acts.shape[1] for acts, _ in codes)
    density = counts / total
    fits = (density >= DENSITY[0]) & (density <= DENSITY[1])
    chosen = (counts * fits).argsort(descending=True)[:CANDIDATES]
    sums, usual = 0, 0
    for batch, (acts, idx) in zip(ids, codes, strict=True):
        p = next_tokens(model, batch)[:, 1:].flatten(0, 1)
        fired = sae.picked(acts.flatten(0, 1), idx.flatten(0, 1), chosen) > 0
        sums, usual = sums + fired.float().T @ p, usual + p.sum(0)
    means = {int(latent): row / row.sum() for latent, row in zip(chosen, sums, strict=True)}
    far = sorted(means, key=lambda latent: -divergence(means[latent], usual / usual.sum()))
    return {latent: means[latent] for latent in far[:n]}


@contextmanager
def random_direction(model: Any, steering: Steering, seed: int) -> Iterator[None]:
    """Every token moves as far as steering moves it, all in one direction drawn at random."""
    direction = torch.randn(steering.sae.d_out, generator=torch.Generator().manual_seed(seed))
    direction /= direction.norm()
    held: list[Tensor] = []

    def read(_site: Site, x: Tensor, _now: Pass, _number: int) -> None:
        held[:] = [steering.read(x)[0].norm(dim=-1, keepdim=True)]

    def write(_site: Site, y: Tensor, _now: Pass) -> Tensor:
        return (y + held[0] * direction).to(y.dtype)

    with at_sites(model, find_sites(model, steering.sae), read, write):
        yield


def how_far(model: Any, run: Path, sae: SAE, ids: Sequence[Tensor], after: dict[int, Tensor]) -> list[dict[str, Any]]:
    """A row for each multiple: the share of KL that is gone, by the latent and by a random direction, means."""

    def mean(block: AbstractContextManager[Any]) -> Tensor:
        with block:
            return torch.stack([next_tokens(model, batch)[:, 1:].flatten(0, 1).mean(0) for batch in ids]).mean(0)

    plain, rows = mean(nullcontext()), []
    for multiple in MULTIPLES:
        gone: dict[str, list[float]] = {"latent": [], "random": []}
        for latent, p in after.items():
            options: dict[str, Any] = dict(unit="max", max_acts=run)
            steering = Steering(sae, {latent: multiple}, **options)
            before = divergence(p, plain)
            for name, block in (
                ("latent", saefast.steer(model, sae, {latent: multiple}, **options)),
                ("random", random_direction(model, steering, latent)),
            ):
                gone[name].append(1 - divergence(p, mean(block)) / before)
        rows.append({"times the largest activation": multiple, **{n: sum(v) / len(v) for n, v in gone.items()},
                     "better than random": sum(a > b for a, b in zip(*gone.values(), strict=True)),
                     "of latents": len(after)})  # fmt: skip
    return rows


def changed(latent: int, value: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The long way's change of a code: the latent has the value, wherever it was."""

    def change(acts: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
        others = torch.where(idx == latent, 0, acts)
        mine = torch.full_like(acts[..., :1], value)
        spare = torch.full_like(idx[..., :1], latent)
        return torch.cat([others, mine], -1), torch.cat([idx, spare], -1)

    return change


def exactness(model: Any, sae: SAE, ids: Tensor, latent: int, value: float) -> dict[str, float]:
    """In float64: how far logits are from the long way's, and how far steering moved them, over their largest."""
    model, sae = model.double(), sae.to(torch.float64)
    clean = model(input_ids=ids, use_cache=False).logits
    with saefast.steer(model, sae, {latent: value}):
        short = model(input_ids=ids, use_cache=False).logits
    with saefast.replace(model, sae, error_term=True, change=changed(latent, value)):
        long = model(input_ids=ids, use_cache=False).logits
    largest = clean.abs().max()
    return {"off": float((short - long).abs().max() / largest), "moved": float((short - clean).abs().max() / largest)}


def costs(model: Any, saes: dict[str, SAE], ids: Tensor, latent: int, value: float, new: int, rounds: int) -> Any:
    """Processor milliseconds of a written token, least of some rounds in which the ways take turns."""
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {"the model alone": nullcontext}
    for name, sae in saes.items():
        ways[f"{name}, steered"] = lambda sae=sae: saefast.steer(model, sae, {latent: value})
        ways[f"{name}, the long way"] = lambda sae=sae: saefast.replace(
            model, sae, error_term=True, change=changed(latent, value)
        )
    found: dict[str, float] = {}
    for number in range(rounds + 1):
        for name, way in ways.items():
            begun = time.process_time()
            with way():
                model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                               do_sample=False, pad_token_id=0)  # fmt: skip
            taken = (time.process_time() - begun) / new * 1e3
            if number:  # the first round warms up
                found[name] = min(taken, found.get(name, taken))
    return found


@torch.no_grad()
def measured(run: Path, n: int, tokens: int, new: int, rounds: int) -> dict[str, Any]:
    folder = ShardFolder(run / "activations")
    model, sae = causal_language_model(folder.index).float(), load_finished(run)
    read, others = list(batches(folder, tokens)), list(batches(folder, BATCH * LENGTH, tokens))
    after = where_latents_fire(model, sae, read, n)
    latent = next(iter(after))
    value = float(Steering(sae, {latent: 4.0}, unit="max", max_acts=run).values[0])
    seen: list[Tensor] = []
    with at_sites(model, find_sites(model, sae), lambda _s, x, _p, _n: seen.append(x[:, 1:].flatten(0, 1))):
        model(input_ids=others[0], use_cache=False)
    saes = {"topk": sae, "jumprelu": as_jumprelu(sae, seen[0]).sae.requires_grad_(False)}
    return {
        "latents": list(after),
        "how far": how_far(model, run, sae, others, after),
        "cost": costs(model, saes, others[0][:1, :16], latent, value, new, rounds),
        "exact": exactness(model, sae, others[0][:1, :64], latent, value),
    }


def main(argv: Sequence[str] | None = None) -> None:
    options = common.arguments(
        "bench.steering", __doc__, argv,
        run=dict(type=Path, default=RUN), latents=dict(type=int, default=6), tokens=dict(type=int, default=3072),
    )  # fmt: skip
    quick = options.quick or options.rehearse
    n, tokens, new, rounds = (2, 1024, 4, 1) if quick else (options.latents, options.tokens, 24, 3)
    results = common.attempt("steering", lambda: measured(options.run, n, tokens, new, rounds))
    if results is not None:
        sizes = {"tokens": tokens, "steered tokens": BATCH * (LENGTH - 1), "new tokens": new, "rounds": rounds}
        common.write_results(options.out, options.device, "steering", {"sizes": sizes, **results})
        common.print_table(results["how far"])
        common.print_table([{"way": way, "ms a token": round(ms, 2)} for way, ms in results["cost"].items()])
        print(results["exact"])


if __name__ == "__main__":
    main()
