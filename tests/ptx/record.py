"""What saefast's GPU drivers launch, without running it: every form of every kernel, at real widths, in seconds.

Inside `recorded(90)` a launch is noted as a Call, and its integers become ones, lest a driver index with whatever an
unwritten tensor holds. Training goes on all the same: its row operations and encodes are launched on copies, and the
results come from plain torch. Tensors keep their dtypes and settings are the architecture's, as on a GPU.
"""

import copy
import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import JITFunction

from ptx.build import kernel_of
from ptx.call import Call, bound, call_of, specialised
from ptx.emulate import as_on_a_gpu
from ptx.scenes import RECIPES, Sizes, encoding, soon, training, updating_along
from saefast import kernels
from saefast.kernels import tuning
from saefast.ops import (
    reference,
    triton_encode_topk,
    triton_sddmm,
    triton_select_kth,
    triton_spmm,
    triton_threshold_encode,
)
from saefast.ops.code import Code, Prefixes
from saefast.ops.groups import Groups
from saefast.optim import reference as rows
from saefast.optim import triton as rows_triton

# Columns of an encode: a group's worth of every setting.
MANY = 4096


OPS = (triton_encode_topk.encode_topk, triton_threshold_encode.threshold_encode, triton_sddmm.sddmm, triton_spmm.spmm)


def shadowed(launch: Callable[..., Any], work: Callable[..., Any]) -> Callable[..., Any]:
    """Launches on copies of its arguments and then does the work in plain torch."""
    known = inspect.signature(work).parameters

    def both(*args: Any, **kwargs: Any) -> Any:
        launch(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        return work(*args, **{k: v for k, v in kwargs.items() if k in known})

    return both


class Shadowed:
    """A backend whose functions are all `shadowed`."""

    def __init__(self, driver: ModuleType, plain: ModuleType) -> None:
        self.driver, self.plain = driver, plain

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return shadowed(getattr(self.driver, name), getattr(self.plain, name))


@contextmanager
def recorded(sm: int, results: bool = True) -> Iterator[list[Call]]:
    """results: whether the ops give any; False: they launch, and what they return means nothing."""
    found: list[Call] = []

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = bound(self.fn, args, kwargs)
        found.append(call_of(self.fn, {p.name for p in self.params if p.is_constexpr}, given, kwargs))
        for value in given.values():
            if isinstance(value, torch.Tensor) and not value.is_floating_point():
                value.fill_(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", note)
        as_on_a_gpu(patch, sm, Shadowed(rows_triton, rows))
        for launch in OPS if results else ():
            name = launch.__name__
            patch.setattr(f"{launch.__module__}.{name}", shadowed(launch, getattr(reference, name)))
        yield found


def signature_of(call: Call) -> str:
    """What the compiler tells apart."""
    signature, constants, attributes = specialised(kernel_of(call), call.arguments)
    options = sorted(call.options.items())
    return json.dumps([call.module, call.kernel, signature, constants, sorted(attributes), options])


def distinct(calls: list[Call]) -> list[Call]:
    return list({signature_of(call): call for call in reversed(calls)}.values())[::-1]


# The widths of DESIGN: GPT-2's, an 8B model's, one that is no power of two, and the widest that a program holds.
# A batch of few entries has no group to cut, a larger one may.
NARROW = Sizes(D=768, L=256, K=32, B=12)
WIDER = (Sizes(D=4096, L=256, K=64, B=6), Sizes(D=2304, L=128, K=32, B=12), Sizes(D=tuning.MAX_ROW, L=128, K=32, B=12))
# Wider than a program holds: torch updates such rows, from gradients that a kernel sums.
TOO_WIDE = Sizes(D=tuning.MAX_ROW + 64, L=256, K=4, B=4)
AT_EVERY_WIDTH = ("hot", "lean", "raw rows, clipped", "lean, raw rows")
# Enough for every kernel, where what the compiler makes of it differs by architecture alone.
ON_EVERY_GPU = ("hot", "lean")


def steps() -> None:
    """Every recipe at one width, and at the others those whose launches depend on it."""
    for recipe in RECIPES:
        training(recipe, NARROW)()
    for sizes in (NARROW, *WIDER):
        for recipe in AT_EVERY_WIDTH:
            training(recipe, replace(sizes, B=4))()
            if sizes != NARROW:
                training(recipe, sizes)()
    training("saefast", TOO_WIDE)()


def few_steps() -> None:
    for sizes in (NARROW, WIDER[0], WIDER[2]):
        for recipe in ON_EVERY_GPU:
            training(recipe, sizes)()
    training("saefast", TOO_WIDE)()


def decodes() -> None:
    """Codes of every length with their biases, AuxK's without, prefixes by latent, and CSR codes."""
    for D, k, dtype in ((4096, 64, torch.bfloat16), (4096, 512, torch.float32), (4096, 2048, torch.bfloat16)):
        x, W = torch.zeros(1, D), torch.zeros(2, D, dtype=dtype)
        decode(x, k, W, [k], b=x[0], error=x)
    for D, k in ((768, 4), (768, 384), (4096, 2048), (8192, 4096)):
        x, W = torch.zeros(1, D), torch.zeros(2, D)
        decode(x, k, W, [k], relu=k == 4)
    x, W = torch.zeros(1, 768), torch.zeros(2, 768)
    decode(x, 128, W, [64, 128], b=x[0], error=x, by_latent=True)
    decode(x, 64, W, [8, 16, 32, 64], b=x[0], by_latent=True)
    for D, dtype in ((768, torch.float32), (4096, torch.bfloat16)):
        x, W = torch.zeros(1, D), torch.zeros(2, D, dtype=dtype)
        decode(x, 64, W, [64], b=x[0], error=x, csr=True)
        decode(x, 64, W, [2], by_latent=True, relu=False, csr=True)
        decode(x, 64, W, [8, 16, 32, 64], b=x[0], by_latent=True, csr=True)


def decode(
    x: Tensor, k: int, W: Tensor, bounds: list[int], b: Tensor | None = None, by_latent: bool = False,
    csr: bool = False, **options: Any,
) -> None:  # fmt: skip
    """One row, and the entries of its code as the step's updates want them."""
    prefixes = Prefixes(bounds, [1.0] * len(bounds), by_latent, len(bounds) - 1)
    code = Code(torch.zeros(1, k), torch.zeros(1, k, dtype=torch.int32))
    if csr:
        code = Code(code.acts[0], code.idx[0], torch.tensor([0, k], dtype=torch.int32))
    rows_triton.decode_loss(x, code, W, b, prefixes, torch.zeros(len(bounds), *x.shape), **options)
    grouped = Groups(code.idx.flatten(), torch.zeros(1, dtype=torch.int32), torch.tensor([0, k], dtype=torch.int32))
    rows_triton.fill_entries(grouped, [(code, code.acts)], prefixes, 2)


def updates_along() -> None:
    """Gradients along the weights: of whole rows and of blocks, at every width."""
    for D in (768, *(sizes.D for sizes in WIDER)):
        for M in (1, 3 if D % 3 == 0 else 2):
            for lean in (False, True):
                updating_along(D, M, lean, n=2)


def encodes() -> None:
    """Every kind of product at a narrow and a wide D, all forms of one, both methods, groups of very many columns."""
    for D in (768, 4096):
        for dtype in (torch.bfloat16, torch.float16):
            best(dtype, D)
        for precision in ("tf32", "ieee"):
            best(torch.float32, D, precision=precision)
    best(torch.float32, 768, precision="tf32", latents=torch.arange(0, MANY, 2, dtype=torch.int32))
    encoding(torch.bfloat16, "fused", 4096, L=MANY)
    encoding(torch.bfloat16, "chunked", 768, L=MANY)
    encoding(torch.float32, "chunked", 4096, L=MANY)
    triton_select_kth.select_kth(torch.zeros(5000, dtype=torch.int32), 7)
    for k in (8, 256):
        best(torch.bfloat16, 16, k, L=96 * k + 8192)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "MANY_COLUMNS", 0)
        best(torch.bfloat16, 768)
        best(torch.bfloat16, 4096)
        for k in (128, tuning.MERGE_MAX_K):
            best(torch.bfloat16, 16, k, L=96 * k + 8192)


def best(dtype: torch.dtype, D: int, k: int = 64, L: int = MANY, precision: str = "ieee", **options: Any) -> None:
    """A top-k by the kernel's own products, in a first chunk and later ones."""
    x, W, b = torch.zeros(2, D, dtype=dtype), torch.zeros(L, D, dtype=dtype), torch.zeros(L)
    triton_encode_topk.encode_topk(x, W, b, k, method="fused", precision=precision, chunk=L // 2, **options)


def steps_launched(every: bool) -> list[Call]:
    """Distinct calls of training, the encoder's with the settings of sm_90: of every recipe, or of a few."""
    torch.manual_seed(0)
    with soon(cut=tuning.CUT), recorded(90) as found:
        if every:
            steps()
        else:
            few_steps()
        decodes()
        updates_along()
    return distinct(found)


def encodings_launched(sm: int) -> list[Call]:
    """Distinct calls of encodes and the sparse products, with an architecture's settings."""
    torch.manual_seed(0)
    with recorded(sm, results=False) as found:
        encodes()
    return distinct(found)


def launched_kernels() -> dict[str, JITFunction]:
    """Kernels that a launch may name: those that no other kernel of their module calls."""
    found: dict[str, JITFunction] = {}
    for module in pkgutil.iter_modules(kernels.__path__):
        names = vars(importlib.import_module(f"saefast.kernels.{module.name}"))
        functions = {n: f for n, f in names.items() if isinstance(f, JITFunction)}
        called = {name for f in functions.values() for name in f.fn.__code__.co_names}
        found |= {n: f for n, f in functions.items() if n not in called}
    return found
