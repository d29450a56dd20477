"""One contender of bench/accelerated.py in a process of its own: a peer's own training loop, accelerated or not.

    python bench/accelerated_child.py 'sparsify, accelerated' '{"B": 1024, "D": 768, "L": 32768, …}'

Prints one JSON object a line: first {"ready": true}, then {"seconds", "loss"} for each "step", {"seconds"} for each
"serve", a forward pass without gradients, and for "memory" {"peak"}, as bench/step_child.py does.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.step_child import N_BATCHES, Memory, batches, import_for, sparsify_step
from saefast.integrations.accelerate import accelerate
from saefast.integrations.accelerate_optimizer import fuse


class Job(NamedTuple):
    """A peer's objects, and its loop around them."""

    given: Any
    """What accelerate() is given: an SAE or a trainer."""
    sae: Any
    optimizer: torch.optim.Optimizer
    step: Callable[[Tensor], Any]
    """A batch -> the loss."""


def sparsify(D: int, L: int, k: int, device: str, **_: Any) -> Job:
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(D, SparseCoderConfig(num_latents=L, k=k), device=device, dtype=torch.float32)
    adam = torch.optim.Adam(sae.parameters(), lr=2e-4)
    return Job(sae, sae, adam, sparsify_step(sae, adam))


def dictionary_learning(D: int, L: int, k: int, device: str, **_: Any) -> Job:
    """TopKTrainer.update, AuxK included, which revives nothing as long as nothing is dead."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=100_000, activation_dim=D, dict_size=L, k=k, layer=0, lm_name="none", device=device, warmup_steps=5,
        seed=0,
    )  # fmt: skip
    count = itertools.count()
    return Job(trainer, trainer.ae, trainer.optimizer, lambda x: trainer.update(next(count), x))


def saelens(D: int, L: int, k: int, device: str, **_: Any) -> Job:
    """SAETrainer.step of a TopKTrainingSAE with its defaults."""
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=D, d_sae=L, k=k, device=device))
    config = SAETrainerConfig(
        total_training_samples=1 << 30, train_batch_size_samples=1024, device=device, lr=3e-4, lr_end=3e-5,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))

    def step(x: Tensor) -> Tensor:
        trainer.n_training_steps += 1
        return trainer.step(x).loss.detach()

    return Job(trainer, sae, trainer.optimizer, step)


JOBS: dict[str, Callable[..., Job]] = {
    "sparsify": sparsify, "dictionary_learning": dictionary_learning, "SAELens": saelens,
}  # fmt: skip


def made(peer: str, form: str, sizes: dict[str, Any]) -> Job:
    """A peer's objects: as they come, with Adam's fused form alone, or accelerated."""
    job = JOBS[peer](**sizes)
    if form == "its Adam fused":
        fuse(job.optimizer)
    elif form == "accelerated":
        accelerate(job.given, job.optimizer)
    elif form:
        raise SystemExit(f"no contender is '{peer}, {form}'")
    return job


def main() -> None:
    peer, _, form = sys.argv[1].partition(", ")
    sizes = json.loads(sys.argv[2])
    device = sizes["device"]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print must not get among the replies
    import_for(peer)
    torch.manual_seed(0)
    rows = batches(**sizes)
    memory = Memory(device)
    job = made(peer, form, sizes)

    def timed(call: Callable[[Tensor], Any], number: int) -> tuple[float, Any]:
        begin = time.perf_counter()
        found = call(rows[number % N_BATCHES])
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin, found

    def reply(**found: Any) -> None:
        replies.write(json.dumps(found) + "\n")
        replies.flush()

    reply(ready=True)
    steps = 0
    for line in sys.stdin:
        order = line.strip()
        if order == "step":
            seconds, loss = timed(job.step, steps)
            steps += 1
            reply(seconds=seconds, loss=float(loss))
        elif order == "serve":
            with torch.no_grad():
                reply(seconds=timed(job.sae, 0)[0])
        else:
            reply(peak=memory.peak())


if __name__ == "__main__":
    main()
