"""One contender of bench/architectures.py in a process of its own; orders and replies as in bench/step_child.py.

    python bench/architectures_child.py CONTENDER '{"name": "jumprelu", "fresh": false, "B": 1024, "D": 384, …}'

An architecture that is not `fresh` is as sparse as after training: thresholds or biases are set so that every latent is
on in k / L of the tokens. Trained latents differ in how often they are on; equal shares touch most rows, which is the
dearest case for a sparse step.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import step_child
from bench.architecture_kinds import Kind, Setting, dense, kinds, own_names, sae_fields

# The penalty's size changes no time; this one leaves the sparsity as it is for the steps that are timed.
COEF = 1e-4
LR, STEPS, WARMUP = 2e-4, 100_000, 5_000
# Latents whose thresholds are found at a time.
CHUNK = 1024


def configs(kind: Kind, D: int, L: int, k: int, B: int) -> tuple[Any, Any]:
    """SAEConfig and TrainConfig; no latent is resampled, for the dense step does not either.

    Rates are those of the first steps of a long run: what is timed stays as sparse as it is.
    """
    from saefast.engines.config import preset

    coef = {"sparsity_coef": COEF} if kind.calibrated else {}
    fixed = {"resample_every": 0, "lr": LR, "lr_warmup_steps": WARMUP, "batch_size": B, **coef}
    return preset("saefast", D, L, k, **sae_fields(kind, L, D), **fixed | dict(kind.train) | dict(kind.timed))


def saefast(name: str, fresh: bool, B: int, D: int, L: int, k: int, device: str) -> step_child.Step:
    from saefast.engines.fused import FusedEngine
    from saefast.models.sae import SAE

    kind, x = kinds()[name], step_child.batches(B, D, device)[0]
    sae_config, config = configs(kind, D, L, k, B)
    sae = SAE(sae_config, seed=0, device=device)
    prepare(own_names(kind, dict(sae.named_parameters())), kind, x, k, fresh)
    engine = FusedEngine(sae, config, STEPS)
    return lambda rows: engine.step(rows, target_of(kind, rows))


def torch_dense(autocast: bool) -> Callable[..., step_child.Step]:
    def make(name: str, fresh: bool, B: int, D: int, L: int, k: int, device: str) -> step_child.Step:
        kind, x = kinds()[name], step_child.batches(B, D, device)[0]
        _, config = configs(kind, D, L, k, B)
        start = parameters(kind, D, L, device)
        prepare(start, kind, x, k, fresh)
        statement = kind.dense(Setting(k, L, COEF, config))
        unit_rows = config.decoder_norm == "post_step"
        trainer = dense.Trainer(
            start, statement, dense.Recipe(LR, STEPS, WARMUP, loss=config.loss, unit_rows=unit_rows)
        )
        del start

        def step(rows: Tensor) -> Any:
            with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=autocast):
                loss, found = trainer.step(rows, target_of(kind, rows))
            return Reply(loss, found.l0.detach())

        return step

    return make


class Reply(NamedTuple):
    loss: Tensor
    l0: Tensor


def parameters(kind: Kind, D: int, L: int, device: str) -> dict[str, Tensor]:
    """As a dense run begins: unit rows at random, encoder = decoder, the rest 0."""
    made: dict[str, Any] = dict(generator=torch.Generator(device).manual_seed(0), device=device)
    W = torch.randn(L, D, **made)
    dense.unit_rows_(W)
    W_enc = W[:, : D // kind.reads].contiguous() if kind.reads > 1 else W.clone()
    zeros = {name: torch.zeros(shape, device=device) for name, shape in kind.own_shapes(L, D).items()}
    biases = {"b_enc": torch.zeros(L, device=device), "b_dec": torch.zeros(D, device=device)}
    return {"W_enc": W_enc, "W_dec": W, **biases, **zeros}


@torch.no_grad()
def prepare(p: Mapping[str, Tensor], kind: Kind, x: Tensor, k: int, fresh: bool) -> None:
    """Centres the SAE on the rows, and makes it as sparse as after training if it is not to be fresh."""
    L = len(p["W_enc"])
    centred = kind.data == "one layer"
    if centred:
        p["b_dec"].copy_(x.mean(0))
    if fresh or not kind.calibrated:
        return
    on = max(round(len(x) * k / L), 1)
    for begin in range(0, L, CHUNK):
        part = slice(begin, begin + CHUNK)
        pre = (x - p["b_dec"] if centred else x) @ p["W_enc"][part].T + p["b_enc"][part]
        # Between the last token that a latent is on in, and the next.
        limit = pre.topk(on + 1, dim=0).values[-2:].mean(0)
        if kind.calibrated == "threshold":
            p["log_threshold"][part] = limit.clamp_min(1e-3).log()
        else:
            p["b_enc"][part] -= limit


def target_of(kind: Kind, rows: Tensor) -> Tensor:
    """What rows are to give."""
    return rows.roll(1, dims=1) if kind.data == "layer to layer" else rows


CONTENDERS = {
    "saefast": saefast,
    "torch fp32": torch_dense(autocast=False),
    "torch bf16 autocast": torch_dense(autocast=True),
}

if __name__ == "__main__":
    step_child.serve(CONTENDERS)
