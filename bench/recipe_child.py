"""One SAE trained by a peer's own package with its own defaults, in the peers' environment.

    python bench/recipe_child.py '{"peer": "SAELens", "rows": "x.npy", "n_latents": 4096, "k": 32, "tokens": 400000,
                                   "cpu_seconds": null, "seed": 0, "out": "weights.npz"}'

With "cpu_seconds" it trains for so long instead, over the rows again and again; processor time, so that a machine with
other things to do changes nothing. Writes W_enc, W_dec (L, D), b_enc and b_dec to `out` and prints one line of JSON:
{"seconds", "cpu_seconds", "tokens", "batch", "lr", "optimizer", "version"}. Times are of training, without imports.
"""

import contextlib
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# sparsify takes 32 sequences a step; of 128 tokens here, as long as most of the rows' contexts are (its own default of
# 2048 would leave 6 steps of 400,000 tokens).
SEQUENCES, CONTEXT = 32, 128

# {"weights": the four parameters, "batch", "lr", "optimizer"}
Found = dict[str, Any]


class TimeUp(Exception):
    """Ends a trainer's own loop."""


class Clock:
    """Starts at the first batch; ends the run at a batch that would begin after `limit` seconds of processor time."""

    def __init__(self, limit: float | None) -> None:
        self.limit, self.tokens = limit, 0
        self.begin: tuple[float, float] | None = None

    def next_batch(self, tokens: int) -> None:
        if self.begin is None:
            self.begin = time.perf_counter(), time.process_time()
        if self.limit is not None and self.taken()["cpu_seconds"] > self.limit:
            raise TimeUp
        self.tokens += tokens

    def taken(self) -> dict[str, float]:
        assert self.begin is not None, "no batch was asked for"
        wall, processor = self.begin
        return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor}


def row_numbers(n: int, tokens: int | None, seed: int) -> Iterator[np.ndarray]:
    """Numbers of rows, a pass in random order at a time, `tokens` of them in all or without end."""
    rng, left = np.random.default_rng(seed), tokens
    while left is None or left > 0:
        part = rng.permutation(n)[:left]
        left = None if left is None else left - len(part)
        yield part


def batches(rows: np.ndarray, size: int, tokens: int | None, seed: int, clock: Clock) -> Iterator[Tensor]:
    """Whole batches (size, D) float32; what a pass leaves over begins the next one's first batch."""
    waiting = np.zeros(0, np.int64)
    for part in row_numbers(len(rows), tokens, seed):
        waiting = np.concatenate([waiting, part])
        whole = len(waiting) // size * size
        for start in range(0, whole, size):
            clock.next_batch(size)
            yield torch.from_numpy(rows[waiting[start : start + size]].astype(np.float32))
        waiting = waiting[whole:]


def saelens(rows: np.ndarray, L: int, k: int, tokens: int | None, seed: int, clock: Clock) -> Found:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    default = {name: field.default for name, field in LanguageModelSAERunnerConfig.__dataclass_fields__.items()}
    batch, lr = default["train_batch_size_tokens"], default["lr"]
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=rows.shape[1], d_sae=L, k=k))
    names = (
        "lr_scheduler_name",
        "lr_warm_up_steps",
        "lr_decay_steps",
        "adam_beta1",
        "adam_beta2",
        "dead_feature_window",
    )
    config = SAETrainerConfig(
        total_training_samples=(tokens or 1 << 40) // batch * batch, train_batch_size_samples=batch, lr=lr,
        lr_end=lr / 10, device="cpu", logger=LoggingConfig(log_to_wandb=False),
        **{name: default[name] for name in names},
    )  # fmt: skip
    until_time_up(SAETrainer(cfg=config, sae=sae, data_provider=batches(rows, batch, tokens, seed, clock)).fit)
    return {
        "weights": {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec},
        "batch": batch, "lr": lr, "optimizer": "Adam",
    }  # fmt: skip


def dictionary_learning(
    rows: np.ndarray, L: int, k: int, tokens: int | None, seed: int, clock: Clock
) -> dict[str, Any]:
    import inspect

    from dictionary_learning.buffer import ActivationBuffer
    from dictionary_learning.trainers.top_k import TopKTrainer

    batch = inspect.signature(ActivationBuffer).parameters["out_batch_size"].default
    # It refuses runs that are shorter than its warm-up: told of a longer one, it warms up all the same.
    steps = max((tokens or 1 << 40) // batch, 1001)
    trainer = TopKTrainer(
        steps=steps, activation_dim=rows.shape[1], dict_size=L, k=k, layer=0, lm_name="none", device="cpu", seed=seed
    )

    def run() -> None:
        for step, x in enumerate(batches(rows, batch, tokens, seed, clock)):
            trainer.update(step, x)

    until_time_up(run)
    return {"weights": of_linear(trainer.ae), "batch": batch, "lr": trainer.lr, "optimizer": "Adam"}


class Lookup(nn.Module):
    """A "language model" whose module `site` puts out rows by number, so that sparsify's trainer can listen there."""

    def __init__(self, rows: np.ndarray, clock: Clock) -> None:
        super().__init__()
        self.rows, self.clock, self.site = rows, clock, nn.Identity()
        self.device = torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        if len(input_ids) == SEQUENCES:
            self.clock.next_batch(input_ids.numel())
        picked = self.rows[input_ids.flatten().numpy()].astype(np.float32)
        return self.site(torch.from_numpy(picked).view(*input_ids.shape, -1))


class Sequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Numbers of rows as sequences of CONTEXT, in random order, again and again up to `length` of them."""

    def __init__(self, n: int, length: int, seed: int) -> None:
        self.n, self.length, self.seed = n, length, seed
        self.pass_number, self.order = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        of_pass, place = divmod(i, max(self.n // CONTEXT, 1))
        if of_pass != self.pass_number:
            self.pass_number = of_pass
            self.order = np.random.default_rng((self.seed, of_pass)).permutation(self.n)
        return {"input_ids": torch.from_numpy(self.order[place * CONTEXT : (place + 1) * CONTEXT])}


def sparsify(rows: np.ndarray, L: int, k: int, tokens: int | None, seed: int, clock: Clock) -> Found:
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    batch = SEQUENCES * CONTEXT
    config = TrainConfig(
        SparseCoderConfig(num_latents=L, k=k), hookpoints=["site"], init_seeds=[seed], log_to_wandb=False,
        # A checkpoint is not what is measured.
        save_every=1 << 40, save_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    assert config.batch_size == SEQUENCES
    length = (tokens or 1 << 40) // batch * SEQUENCES
    trainer = Trainer(config, Sequences(len(rows), length, seed), Lookup(rows, clock))
    until_time_up(trainer.fit)
    for optimizer in trainer.optimizers:
        # What it saves is the average over steps, which schedule-free optimisers put in the weights' place so.
        optimizer.eval()
    coder = trainer.saes["site"]
    weights = {"W_enc": coder.encoder.weight, "W_dec": coder.W_dec, "b_enc": coder.encoder.bias, "b_dec": coder.b_dec}
    return {"weights": weights, "batch": batch, "lr": 5e-3 / (L / 2**14) ** 0.5, "optimizer": config.optimizer}


def of_linear(peer: Any) -> dict[str, Tensor]:
    return {
        "W_enc": peer.encoder.weight, "W_dec": peer.decoder.weight.T, "b_enc": peer.encoder.bias, "b_dec": peer.b_dec
    }  # fmt: skip


def until_time_up(run: Callable[[], object]) -> None:
    with contextlib.suppress(TimeUp):
        run()


PEERS: dict[str, tuple[Callable[..., Found], str]] = {
    "SAELens": (saelens, "sae-lens"),
    "sparsify": (sparsify, "eai-sparsify"),
    "dictionary_learning": (dictionary_learning, "dictionary-learning"),
}


def main() -> None:
    asked = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print must not get among the replies
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    torch.manual_seed(asked["seed"])
    train, package = PEERS[asked["peer"]]
    rows, clock = np.load(asked["rows"], mmap_mode="r"), Clock(asked["cpu_seconds"])
    tokens = None if asked["cpu_seconds"] is not None else asked["tokens"]
    found = train(rows, asked["n_latents"], asked["k"], tokens, asked["seed"], clock)
    taken = clock.taken()
    np.savez(asked["out"], **{name: value.detach().float().numpy() for name, value in found.pop("weights").items()})
    found |= taken | {"tokens": clock.tokens, "version": importlib.metadata.version(package)}
    replies.write(json.dumps(found) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
