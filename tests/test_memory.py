"""Memory is as large and of the kind that its users take it for: pinned where it is made, looked at again in C++."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from folders import write_folder
from test_imports import MODULES
from torch import Tensor

from saefast import extension, ops
from saefast.data import gather
from saefast.data.iterable_source import IterableSource
from saefast.data.live_buffer import LiveBuffer
from saefast.data.mapped_source import Located
from saefast.data.opening import open_source
from saefast.data.shard_buffer import ShardBuffer
from saefast.engines.config import TrainConfig
from saefast.engines.fused import FusedEngine
from saefast.errors import InputError
from saefast.latents.cofiring import cofiring
from saefast.latents.spool import spool_codes
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.optim import native as rows_native
from saefast.optim.state import AdamStep, Job, Matrix, RowGradient

# Functions of torch that make a tensor of the default dtype, or may, and on the default device.
MAKERS = {
    "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
    "randn", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
# These make int64, arange from whole numbers.
INTEGER_MAKERS = {"arange", "randint", "randperm"}
# Kinds of their own name, on a device that cannot be given.
FORBIDDEN = {"Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "IntTensor", "LongTensor", "get_default_dtype"}


def loose_calls(tree: ast.AST) -> Iterator[str]:
    """Calls in a module that leave a new tensor's dtype or device to what the process has set."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        name, given = node.func.attr, {keyword.arg for keyword in node.keywords}
        if name in FORBIDDEN:
            yield f"line {node.lineno}: torch.{name}"
        wanted = {"dtype", "device"} if name in MAKERS else {"device"} if name in INTEGER_MAKERS else set()
        if missing := wanted - given:
            yield f"line {node.lineno}: torch.{name} without {' and '.join(sorted(missing))}"


def test_the_walk_sees_loose_calls() -> None:
    source = "torch.zeros(3)\ntorch.empty(3, dtype=torch.int8, device=d)\ntorch.randperm(3)\nx = torch.Tensor(3)"
    found = list(loose_calls(ast.parse(source)))
    assert [line.split(":")[0] for line in found] == ["line 1", "line 3", "line 4"]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_new_memory_names_its_dtype_and_its_device(module: str) -> None:
    found = list(loose_calls(ast.parse(MODULES[module])))
    assert not found, f"{module}: {found}: another default dtype or device would change what these make"


# What the extension offers that takes no tensors itself; gather_rows_cuda needs a GPU.
OTHERS = {
    "Buffer", "BufferSettings", "HAS_CUDA", "INTERFACE", "RowStream", "decode_loss", "gather_rows_cuda",
    "gradient_squares", "tile_kernel_names", "update_rows",
}  # fmt: skip
METHODS = {"gather", "push", "read", "write"}
# What these give has methods that take tensors as well.
WITH_METHODS = {"RowStream", "Sources", "ThresholdCode", "open_files", "open_queue"}
# With a smaller tensor these have less to do, or enough left. A RowGradient is held against its matrix in a job.
MAY_SHRINK = {
    "AdamStep",
    "RowGradient",
    "catch_up",
    "batch_sums",
    "normalise_rows",
    "read",
    "select_kth",
    "weighted_row_sum",
}


def wrong_tensors(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Stand-ins that a call must refuse: another dtype, another device, gaps in the memory, less of it."""
    yield "dtype", tensor.to(torch.int16)
    yield "device", tensor.to("meta")
    if tensor.numel() > 1:
        yield "layout", torch.stack([tensor, tensor], -1)[..., 0]
    if tensor.numel():
        yield "size", tensor[:-1] if tensor.dim() < 2 else tensor[:, :-1].contiguous()


class Attacked:
    """The extension, or an object of it: every call is first tried with each of its tensors replaced by a wrong one."""

    def __init__(self, real: Any, tried: set[str]) -> None:
        self._real, self._tried = real, tried

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if not callable(real):
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            for i, given in enumerate(args):
                self._attack(name, given, lambda bad, i=i: real(*args[:i], bad, *args[i + 1 :], **kwargs))
            for key, given in kwargs.items():
                self._attack(name, given, lambda bad, key=key: real(*args, **kwargs | {key: bad}))
            made = real(*args, **kwargs)
            return Attacked(made, self._tried) if name in WITH_METHODS else made

        return call

    def _attack(self, name: str, given: Any, use: Callable[[Any], Any]) -> None:
        first = given[0] if isinstance(given, list) and given else given
        if not isinstance(first, Tensor):
            return
        self._tried.add(name)
        for kind, wrong in wrong_tensors(first):
            if kind == "size" and name in MAY_SHRINK:
                continue
            with pytest.raises((TypeError, ValueError)):
                use(wrong if given is first else [wrong, *given[1:]])


def use_everything(folder: Path) -> list[Tensor]:
    """Calls whatever takes tensors in the extension, as the library does; what came of it."""
    x = torch.randn(96, 24, generator=torch.Generator().manual_seed(0))
    found = []
    for config in (
        TrainConfig(multi_topk_coef=0.1, dead_after=40, auxk_k=4, max_grad_norm=1.0, decoder_norm="pre_forward"),
        TrainConfig(optimizer="adam-lean", dead_after=40, auxk_k=4, decoder_norm="pre_forward"),
    ):
        sae = SAE(SAEConfig(24, 64, 4, rescale_acts_by_decoder_norm=True), seed=0)
        step = FusedEngine(sae, config, 4, settle_every=2, mixed=config.optimizer == "adam")
        step.initialise(x)
        for batch in x.split(32):
            step.step(batch)
        step.finish()
        found += [p.detach().clone() for p in sae.parameters()]
    acts, idx = ops.encode_topk(x, found[0], found[2], 3)
    found += ops.encode_batch_topk(x, found[0], found[2], 3)[:3]
    found += ops.encode_group_max(x, found[0], found[2], 4)
    found += [acts, idx, *ops.threshold_encode(x, found[0], found[2], 0.5), ops.sddmm(x, idx, found[1])]
    found += [ops.spmm(acts, idx, found[1]), gather.gather_rows(x, idx[:, 0].long())]
    found.append(gather.RowTable([x[:50], x[50:]]).gather(torch.arange(96)))
    spool = spool_codes(sae, [Located(x, None, None)], folder.parent)
    found += map(torch.from_numpy, cofiring(spool, spool.by_latent(0, 64), 0))
    return found + list(buffered(write_folder(folder)))


def buffered(folder: Path) -> Iterator[Tensor]:
    """A batch from each kind of buffer."""
    rows = open_source(folder, shuffle="mapped")
    for on_device in (False, True):
        source = ShardBuffer(rows, reservoir_rows=10 * 16, on_device=on_device)
        yield next(source.batches(16))["x"].clone()
        source.close()
    live = LiveBuffer(IterableSource([torch.ones(16, 8)] * 40), reservoir_rows=10 * 16)
    yield next(live.batches(16))["x"].clone()
    live.close()


@pytest.mark.skipif(not extension.available(), reason="needs the C++ extension")
def test_cpp_refuses_tensors_that_are_not_what_it_writes_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = use_everything(tmp_path / "a")
    real, tried = extension.load(), set[str]()
    monkeypatch.setattr(extension, "load", lambda: Attacked(real, tried))
    found = use_everything(tmp_path / "b")
    # Nothing was written before a tensor was refused.
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert tried == {name for name in dir(real) if not name.startswith("_")} - OTHERS | METHODS


@pytest.mark.skipif(not extension.available(), reason="needs the C++ extension")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rows=torch.tensor([0, 5], dtype=torch.int32)), r"rows\[1\] is 5, outside \[0, 5\)"),
        (dict(rows=torch.tensor([0], dtype=torch.int32)), "the gradient has 2 rows of 3: expected 1 of 3"),
        (dict(offsets=torch.tensor([0, 2, 9], dtype=torch.int32)), r"offsets\[2\] is 9"),
        (dict(offsets=torch.tensor([0, 2, 1], dtype=torch.int32)), r"offsets\[2\] is 1"),
        (dict(row=torch.tensor([0, 1, 7], dtype=torch.int32)), r"row\[2\] is 7, outside \[0, 4\)"),
        (dict(last_step=torch.tensor([0, -1, 0, 0, 0], dtype=torch.int32)), r"last_step\[0\] is -1"),
        (dict(step=9), "drift holds 8 elements: expected 9 or more"),
        (dict(source=torch.ones(4, 2)), "the gradient has 2 rows of 2: expected 2 of 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_cpp_refuses_a_job_whose_numbers_lead_outside(changes: dict[str, Any], message: str) -> None:
    parts = dict(
        rows=torch.tensor([0, 1], dtype=torch.int32), offsets=torch.tensor([0, 2, 3], dtype=torch.int32),
        row=torch.tensor([0, 1, 2], dtype=torch.int32), last_step=torch.zeros(5, dtype=torch.int32),
        source=torch.ones(4, 3), step=1,
    )  # fmt: skip

    def update(given: dict[str, Any]) -> Matrix:
        matrix = Matrix(torch.ones(5, 3), torch.zeros(5, 3), torch.zeros(5, 3), given["last_step"])
        table = torch.zeros(8, dtype=torch.float64)
        step = AdamStep(given["step"], 0.9, 0.999, 1e-2, 1e-8, table, table)
        gradient = RowGradient(given["source"], given["offsets"], given["row"], torch.ones(3))
        rows_native.update_rows([Job(matrix, step, gradient, given["rows"], torch.zeros(2))])
        return matrix

    assert (update(parts).w[:2] < 1).all()
    with pytest.raises((IndexError, ValueError), match=message):
        update(parts | changes)


def test_an_extension_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension.importlib, "import_module", lambda name: SimpleNamespace(INTERFACE=-1))
    extension.load.cache_clear()
    with pytest.raises(InputError, match="another version of its sources: build it anew"):
        extension.load()
    monkeypatch.undo()
    extension.load.cache_clear()
