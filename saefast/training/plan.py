"""`saefast plan`: memory, traffic, time and cost of a training run, calculated before it starts.

Memory is counted from the very tensors a run makes. Times are a roofline: each stage takes the longer of its
arithmetic at 85 % of the device's matrix rate and its traffic at 60 % of its bandwidth, one stage after another.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from saefast import ops
from saefast.devices import DEVICES, Device, find
from saefast.engines.config import TrainConfig
from saefast.engines.recipe import LARGEST_BATCH, Recipe, choose
from saefast.errors import InputError
from saefast.models.architecture import At
from saefast.models.config import SAEConfig
from saefast.ops import mixed
from saefast.ops.chunks import scratch_bytes
from saefast.optim.state import LeanMatrix, Matrix
from saefast.training import machine
from saefast.typed import typed

# Shares of a device's peak that well-made kernels reach.
MATRIX_SHARE, TRAFFIC_SHARE = 0.85, 0.60
# The GPU encoder (kernels/encode_tiles.py): latents of its first chunk, latents per group maximum, cap of its scratch.
FIRST_CHUNK, GROUP, SCRATCH = 4096, 64, 1 << 30
# Tokens of a run whose length nobody has said.
PLENTY = 1 << 30
# Bytes of an entry of the sparse code while a step lasts: values, indices, gradients, order, weights, planes, tokens.
ENTRY = 48


Optimizer = Literal["adam", "adam-lean"]
OPTIMIZERS: tuple[Optimizer, ...] = ("adam", "adam-lean")


class Sizes(NamedTuple):
    """What the memory and the time of a run depend on."""

    d_in: int
    n_latents: int
    k: int
    batch_size: int = LARGEST_BATCH
    optimizer: Optimizer = TrainConfig.optimizer
    settle_every: int = TrainConfig.settle_every
    ranked: int | None = None
    """Entries that the encoder ranks for a token; None is k, which is what a token has on average."""
    terms: int = 1
    """Reconstructions that the loss adds up."""
    d_out: int | None = None
    """Width of what is reconstructed where that is a target of its own; None is x."""
    own: int = 0
    """Numbers in the matrices that the architecture adds."""
    blocks: int = 1
    """Of latents, each of which reads its own share of the columns of x."""

    @property
    def reads(self) -> int:
        """Width of a row of W_enc."""
        return self.d_in // self.blocks

    @property
    def width_out(self) -> int:
        return self.d_in if self.d_out is None else self.d_out

    @classmethod
    def of(cls, sae: SAEConfig, train: Recipe) -> "Sizes":
        architecture = sae.architecture()
        k, ranked = architecture.width(train), architecture.ranked(train)
        settings = train.batch_size, train.optimizer, train.settle_every
        # As many as ever: k may come down as training goes on.
        terms = len(architecture.terms(train, At(0, PLENTY)).prefixes)
        d_out = architecture.shapes()["b_dec"][-1] if architecture.has_target else None
        own = sum(value.numel() for value in architecture.parameters().values() if value.dim() > 1)
        found = cls(sae.d_in, sae.n_latents, k, *settings, None if ranked == k else ranked, terms, d_out, own)
        return found._replace(blocks=len(architecture.blocks()))


class Stage(NamedTuple):
    """A part of a step: arithmetic, traffic, and the seconds they should take."""

    name: str
    flops: float
    traffic: float
    seconds: float


@dataclass
class Plan:
    """What a run needs. memory: bytes by part; stages of a step in order."""

    sizes: Sizes
    device: Device
    device_name: str
    memory: dict[str, int]
    stages: list[Stage]

    @property
    def total_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.device.memory

    @property
    def seconds(self) -> float:
        """Of one step."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def tokens_per_second(self) -> float:
        return self.sizes.batch_size / self.seconds


@typed
def make_plan(sae_config: SAEConfig, train_config: TrainConfig, device: str = "auto") -> Plan:
    """What training this SAE so will need.

    Args:
        train_config: without n_tokens, settings for PLENTY of them.
        device: b200, h200, h100, ... (see `saefast.devices`), or cpu: this machine's, measured; "auto" is this
            machine's GPU, else its CPU.

    Raises:
        InputError: a device that is not in the table.
    """
    sizes = Sizes.of(sae_config, choose(sae_config, train_config, PLENTY))
    name, found = find_device(device)
    return Plan(sizes, found, name, memory_of(sizes, name), stages_of(sizes, found))


def memory_of(sizes: Sizes, device: str) -> dict[str, int]:
    """Bytes by part, all at the step's peak."""
    L, D, B, k = sizes.n_latents, sizes.d_in, sizes.batch_size, sizes.k
    weights, state, copies = matrices_of(sizes)
    # Of a target: as drawn and scaled.
    wide = sizes.width_out * (1 + sizes.terms + 2 * (sizes.d_out is not None))
    # Of blocks: the residual in the columns that each writes.
    wide += sizes.width_out * sizes.blocks * (sizes.blocks > 1)
    return {
        "weights": weights,
        "optimiser state": state,
        "bf16 copy of W_enc": copies,
        # b_enc with its moments and gradient, counters of silence before and after, of age, a flag, row norms' squares.
        "biases and counters": L * (4 * 4 + 3 * 8 + 1 + 4),
        "sparse code": B * k * ENTRY,
        # x as drawn and scaled, centred; error, and a residual for each term.
        "batch": (3 * D + wide) * B * 4,
        "encoder scratch": scratch_of(sizes, device),
    }


def scratch_of(sizes: Sizes, device: str) -> int:
    """Bytes of the encoder's scratch. On a CPU it keeps its tiles in the cache."""
    if device == "cpu":
        return 0
    ranked = min(mixed.candidates(sizes.ranked or sizes.k), sizes.n_latents)
    return scratch_bytes(sizes.batch_size, sizes.n_latents, ranked, SCRATCH)


def matrices_of(sizes: Sizes) -> tuple[int, int, int]:
    """Bytes of both weight matrices, their optimiser state, and the encoder's bf16 copy, from the real classes."""
    lean, L = sizes.optimizer == "adam-lean", sizes.n_latents
    kind = torch.bfloat16 if lean else torch.float32
    enc, dec = (torch.empty(L, width, dtype=kind, device="meta") for width in (sizes.reads, sizes.width_out))
    total = sum((LeanMatrix.of(w, seed=0) if lean else Matrix.of(w)).bytes() for w in (enc, dec))
    weights = (enc.numel() + dec.numel() + sizes.own) * enc.element_size()
    # What is added trains in float32: moments and a gradient, and with "adam-lean" the weights themselves.
    total += sizes.own * (enc.element_size() + 12 + 4 * lean)
    return weights, total - weights, 0 if lean else enc.numel() * 2


def stages_of(sizes: Sizes, device: Device) -> list[Stage]:
    """Arithmetic and traffic of a step, latents used uniformly (real use is skewed, which touches fewer rows)."""
    L, D, B, k, out = sizes.n_latents, sizes.reads, sizes.batch_size, sizes.k, sizes.width_out
    lean = sizes.optimizer == "adam-lean"
    entries, touched = B * k, L * -math.expm1(-B * k / L)
    weight_bytes = 2 if lean else 4
    # Read and written: weights and moments; adam-lean's second moment is one number a row.
    number = 2 * (2 + 1) if lean else 2 * 12
    first = max(FIRST_CHUNK, 64 * k)
    stored = min(1.0, first / L + 1.2 * GROUP * k * max(math.log(L / first), 0) / L)
    scratch = B * L * (8 * stored + 8 / GROUP)
    shapes = [
        ("encode, top-k", 2.0 * B * L * D, L * D * 2 + B * sizes.d_in * 2 + scratch),
        (
            "decode, loss, gradient to acts",
            4.0 * entries * out,
            entries * out * weight_bytes + (2 + sizes.terms) * B * out * 4,
        ),
        ("groups", 0.0, entries * 64.0),
        ("update W_dec", 2.0 * entries * out, entries * out * 4 + touched * out * number),
        ("update W_enc", 2.0 * entries * D, entries * D * 4 + touched * D * (number + 2 * (not lean))),
        ("settling of W_enc", 0.0, (L - touched) * D * number / sizes.settle_every),
        ("biases, counters", 0.0, L * 60.0),
    ]
    # Sparse products are gathers: what bounds them is traffic, on plain arithmetic units.
    return [
        Stage(name, flops, traffic, _seconds(flops if name.startswith("encode") else 0.0, traffic, device))
        for name, flops, traffic in shapes
    ]


def _seconds(flops: float, traffic: float, device: Device) -> float:
    return max(flops / (MATRIX_SHARE * device.flops), traffic / (TRAFFIC_SHARE * device.bandwidth))


def largest(sizes: Sizes, optimizer: Optimizer, device: str, memory: float) -> int:
    """The largest n_latents that fits into `memory` bytes at this width, k and batch; 0 where none does."""
    low, high = 0, 1 << 36
    while low < high:
        middle = (low + high + 1) // 2
        asked = sizes._replace(n_latents=middle, k=min(sizes.k, middle), optimizer=optimizer)
        low, high = (middle, high) if sum(memory_of(asked, device).values()) <= memory else (low, middle - 1)
    return low


def find_device(name: str) -> tuple[str, Device]:
    """The device asked for. "auto" and "cpu" look at this machine.

    Raises:
        InputError: a device, or a GPU in this machine, that is not in the table.
    """
    if name.lower() == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu", measure_cpu()
    asked = torch.cuda.get_device_name() if name == "auto" else name
    key = find(asked)
    if key is None:
        raise InputError(f"device {asked!r} is not in the table: name one of {', '.join(DEVICES)}, or cpu")
    if name == "auto":
        # One name is sold with several sizes of memory.
        return key, DEVICES[key]._replace(memory=torch.cuda.get_device_properties().total_memory)
    return key, DEVICES[key]


def measure_cpu() -> Device:
    """This machine: memory, the rate of the encoder itself, and the bandwidth of a copy, in about a second."""
    low = mixed.pays_off(torch.empty(1, 1, dtype=torch.float32, device="cpu"))
    x, W = (torch.randn(n, 512, dtype=torch.float32, device="cpu") for n in (512, 8192))
    with machine.Watch() as others:
        full = low_rate = _rate(x, W)
        if low:
            low_rate = _rate(x.to(torch.bfloat16), W.to(torch.bfloat16))
        source, target = (torch.zeros(1 << 26, dtype=torch.float32, device="cpu") for _ in range(2))
        bandwidth = 2 * source.nbytes / _fastest(lambda: target.copy_(source))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # The shares below are of peaks; these are rates reached.
    return Device(
        memory,
        low_rate / MATRIX_SHARE,
        full / MATRIX_SHARE,
        bandwidth / TRAFFIC_SHARE,
        "measured just now",
        others.share,
    )


def _rate(x: torch.Tensor, W: torch.Tensor) -> float:
    """FLOP/s of the encoder on x (B, D) and W (L, D)."""
    return 2.0 * len(x) * W.numel() / _fastest(lambda: ops.encode_topk(x, W, None, 32))


def _fastest(call: Callable[[], object], rounds: int = 4) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
