"""One contender of bench/step.py in a process of its own: takes a training step for every line it reads.

    python bench/step_child.py CONTENDER '{"B": 1024, "D": 768, "L": 32768, "k": 32, "device": "cpu"}'

With "activation": "batchtopk" and "matryoshka": [2048, 8192, 32768] it trains an SAE of that kind; without, TopK alone.
Prints one JSON object a line: first {"ready": true}, then for each "step" {"seconds", "loss"}, and for "memory"
{"peak"}, the resident memory it grew by at its worst since before the model was made. Imports only what its contender
needs, since the peers live in another environment.
"""

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[Tensor], Any]
N_BATCHES = 8


def batches(B: int, D: int, device: str, **_: Any) -> list[Tensor]:
    """Rows made of sparse sources of very different frequency, with noise and a mean: what activations are like."""
    # Made where they are needed: a CPU takes 20 s for the largest of them.
    made: dict[str, Any] = dict(generator=torch.Generator(device).manual_seed(0), device=device)
    n = 4 * D
    sources = torch.randn(n, D, **made) / D**0.5
    share = 0.2 * torch.arange(1, n + 1, device=device) ** -0.6
    rows = []
    for _ in range(N_BATCHES):
        code = torch.rand(B, n, **made) * (torch.rand(B, n, **made) < share)
        rows.append(code @ sources * 10 + 0.1 * torch.randn(B, D, **made) + 1.0)
    return rows


def kind(activation: str = "topk", matryoshka: Sequence[int] = (), **_: Any) -> dict[str, Any]:
    """Fields of SAEConfig that say what the SAE is; empty for TopK alone."""
    named = {} if activation == "topk" else {"activation": activation}
    return named | ({"matryoshka": tuple(matryoshka)} if matryoshka else {})


def saefast(D: int, L: int, k: int, device: str, optimizer: str = "adam", **sizes: Any) -> Step:
    from saefast.engines.config import preset
    from saefast.engines.fused import FusedEngine
    from saefast.models.sae import SAE

    dtype = "bfloat16" if optimizer == "adam-lean" else "float32"  # as train() begins such a run
    sae_config, config = preset("saefast", D, L, k, optimizer=optimizer, dtype=dtype, **kind(**sizes))
    return FusedEngine(SAE(sae_config, seed=0, device=device), config, 100_000).step


class Dense(torch.nn.Module):
    """An SAE as one writes it in PyTorch, with every part of the step that the others have too."""

    def __init__(
        self, D: int, L: int, k: int, device: str, autocast: bool, compiled: bool, activation: str = "topk",
        matryoshka: Sequence[int] = (), **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.k, self.autocast, self.activation, self.widths = k, autocast, activation, [0, *(matryoshka or [L])]
        W = torch.randn(L, D, device=device)
        W /= W.norm(dim=1, keepdim=True)
        self.W_enc, self.W_dec = torch.nn.Parameter(W.clone()), torch.nn.Parameter(W)
        self.b_enc = torch.nn.Parameter(torch.zeros(L, device=device))
        self.b_dec = torch.nn.Parameter(torch.zeros(D, device=device))
        self.since_fired = torch.zeros(L, dtype=torch.int64, device=device)
        self.threshold = torch.zeros((), device=device)
        self.adam = torch.optim.Adam(self.parameters(), lr=2e-4, fused=True)
        self.run = torch.compile(self.loss) if compiled else self.loss

    def top_k(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """The code (B, L), and the latents that fired."""
        acts, idx = pre.topk(self.k, dim=1, sorted=False)
        acts = acts.relu()
        return torch.zeros_like(pre).scatter(1, idx, acts), idx[acts > 0]

    def batch_top_k(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the k · B largest of the batch; the running threshold follows the smallest of them."""
        flat = pre.relu().flatten()
        acts, idx = flat.topk(self.k * len(pre), sorted=False)
        with torch.no_grad():
            self.threshold.lerp_(acts[acts > 0].min().float(), 0.01)
        return torch.zeros_like(flat).scatter(0, idx, acts).view_as(pre), idx[acts > 0] % pre.shape[1]

    def loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = F.linear(x - self.b_dec, self.W_enc, self.b_enc)
        code, fired = self.top_k(pre) if self.activation == "topk" else self.batch_top_k(pre)
        x_hat, squares = self.b_dec, torch.zeros((), device=x.device)
        for begin, end in itertools.pairwise(self.widths):
            x_hat = x_hat + code[:, begin:end] @ self.W_dec[begin:end]
            squares = squares + (x - x_hat).float().square().sum()
        return squares / (x - x.mean(0)).square().sum(), fired

    def step(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            loss, fired = self.run(x)
        loss.backward()
        with torch.no_grad():
            grad, W = self.W_dec.grad, self.W_dec
            assert grad is not None
            grad -= (grad * W).sum(1, keepdim=True) * W
            self.adam.step()
            self.adam.zero_grad()
            W /= W.norm(dim=1, keepdim=True)
            self.since_fired += len(x)
            self.since_fired[fired] = 0
        return loss.detach()


def sparsify_step(sae: Any, adam: torch.optim.Optimizer) -> Step:
    """sparsify 1.3.3 as its Trainer drives it (trainer.py, the forward hook and what follows the backward pass)."""
    made: dict[str, Any] = dict(device=sae.b_dec.device)
    fired = torch.zeros(sae.num_latents, dtype=torch.bool, **made)
    since_fired = torch.zeros(sae.num_latents, dtype=torch.int64, **made)

    def step(x: Tensor) -> Tensor:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, dead_mask=None)
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        fired.zero_()
        fired[out.latent_indices.flatten()] = True
        since_fired.add_(len(x))
        since_fired[fired] = 0
        return out.fvu.detach()

    return step


def sparsify(D: int, L: int, k: int, device: str, **_: Any) -> Step:
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(D, SparseCoderConfig(num_latents=L, k=k), device=device, dtype=torch.float32)
    return sparsify_step(sae, torch.optim.Adam(sae.parameters(), lr=2e-4))


def dictionary_learning(
    D: int, L: int, k: int, device: str, activation: str = "topk", matryoshka: Sequence[int] = (), **_: Any
) -> Step:
    settings: dict[str, Any] = dict(
        steps=100_000, activation_dim=D, dict_size=L, k=k, layer=0, lm_name="none", device=device, warmup_steps=5,
        seed=0,
    )  # fmt: skip
    if activation == "topk":
        from dictionary_learning.trainers.top_k import TopKTrainer as Trainer
    else:
        # From the first step on, as after the thousandth of a run.
        settings["threshold_start_step"] = 0
        if matryoshka:
            from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer as Trainer

            settings["group_fractions"] = [(b - a) / L for a, b in itertools.pairwise([0, *matryoshka])]
        else:
            from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer as Trainer
    trainer = Trainer(**settings)
    count = iter(range(1 << 30))
    return lambda x: trainer.update(next(count), x)


def saelens(
    D: int, L: int, k: int, device: str, activation: str = "topk", matryoshka: Sequence[int] = (), **_: Any
) -> Step:
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    settings: dict[str, Any] = {"matryoshka_widths": list(matryoshka)} if matryoshka else {}
    name = {"topk": "TopK", "batchtopk": "MatryoshkaBatchTopK" if matryoshka else "BatchTopK"}[activation]
    sae = getattr(sae_lens, f"{name}TrainingSAE")(
        getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=D, d_sae=L, k=k, **settings)
    )
    config = SAETrainerConfig(
        total_training_samples=1 << 30, train_batch_size_samples=1024, device=device, lr=3e-4, lr_end=3e-5,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))

    def step(x: Tensor) -> Tensor:
        trainer.n_training_steps += 1
        return trainer.step(x).loss.detach()

    return step


def dense(autocast: bool, compiled: bool = False) -> Callable[..., Step]:
    return lambda **sizes: Dense(autocast=autocast, compiled=compiled, **sizes).step


CONTENDERS: dict[str, Callable[..., Step]] = {
    "saefast": saefast,
    "saefast lean": lambda **sizes: saefast(optimizer="adam-lean", **sizes),
    "torch fp32": dense(autocast=False),
    "torch bf16 autocast": dense(autocast=True),
    "torch.compile bf16": dense(autocast=True, compiled=True),
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "SAELens": saelens,
}


def import_for(name: str) -> None:
    """Imports a contender's packages before memory is counted."""
    # torch's optimisers import torch._dynamo, 145 MB.
    modules = {"saefast": "saefast.engines.fused", "SAELens": "sae_lens", "torch": "torch._dynamo"}
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    first = re.split(r"[ .]", name)[0]
    __import__(modules.get(first, first))


def resident(field: str) -> int:
    """Bytes: VmRSS now, or VmHWM at its highest."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


class Memory:
    """What has been used at the worst moment since this object was made."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            # The batches, which every contender has.
            self.before = torch.cuda.memory_allocated()
            return
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        self.before = resident("VmRSS")

    def peak(self) -> int:
        worst = torch.cuda.max_memory_allocated() if self.device == "cuda" else resident("VmHWM")
        return worst - self.before


def serve(contenders: Mapping[str, Callable[..., Step]]) -> None:
    """Is the contender that the command line names, until there are no more orders."""
    name, sizes = sys.argv[1], json.loads(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print must not get among the replies
    device = sizes["device"]
    import_for(name)
    torch.manual_seed(0)
    rows = batches(**sizes)
    memory = Memory(device)
    step = contenders[name](**sizes)
    replies.write(json.dumps({"ready": True}) + "\n")
    replies.flush()
    for count, line in enumerate(sys.stdin):
        if line.strip() == "step":
            begin = time.perf_counter()
            loss = step(rows[count % N_BATCHES])
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
            reply = {"seconds": seconds, "loss": float(getattr(loss, "loss", loss))}
            if hasattr(loss, "l0"):
                reply["l0"] = float(loss.l0)
        else:
            reply = {"peak": memory.peak()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    serve(CONTENDERS)
