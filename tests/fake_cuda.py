"""A CUDA device that is not there: tensors that say they lie on it, and a count of what the host waits for.

    with fake_cuda.device() as gpu:
        sae = SAE(config, device=gpu.name)
        ...
        with gpu.counting() as waits: engine.step(x)

Everything runs: torch's operations on CPU memory behind the tensors, kernels in Triton's interpreter. Counted are

* reads: a value that comes to the host (.item(), float(), if tensor, .tolist(), .cpu(), torch.equal);
* sizes that depend on values, which torch reads before it can go on (nonzero, unique, a mask as an index,
  repeat_interleave without its output's size);
* copies from memory of the host that is not pinned (.to(device), torch.tensor(..., device=...)).

As on a GPU, an operation on tensors of both devices fails, and so does a kernel given a CPU tensor.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from saefast.ops import registered, triton_launch

aten = torch.ops.aten
NAME = torch.device("cuda:0")
READS = {aten._local_scalar_dense, aten.equal, aten.is_nonzero}
SIZES = {
    aten.nonzero, aten.masked_select, aten.unique_consecutive, aten._unique, aten._unique2, aten.unique_dim,
    aten.unique_dim_consecutive, aten.bincount,
}  # fmt: skip
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {aten._to_copy, aten.copy_}
# Adds floats by atomics on a GPU, in whatever order they come.
ATOMIC = {aten.index_add, aten.index_add_, aten.scatter_reduce, aten.scatter_reduce_, aten.index_reduce_}


class Gpu(TorchDispatchMode):
    """The device while it is there. `waits` counts by what was waited for; `atomics` what does not repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.atomics: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """A count of what the block makes the host wait for."""
        self.waits = Counter()
        yield self.waits
        self.waits = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = pytree.arg_tree_leaves(*args, **kwargs)
        tensors = [t for t in given if isinstance(t, torch.Tensor)]
        ours = [t for t in tensors if isinstance(t, OnGpu)]
        target = kwargs.get("device")
        source = NAME if ours else torch.device("cpu")
        target = source if target is None else torch.device(target)
        self._watch(func, tensors, ours, target, kwargs)
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        args, kwargs = pytree.tree_map(inner, (args, kwargs))
        found = func(*args, **kwargs)
        if target.type != "cuda":
            return found
        # What works in place returns what it was given.
        known = {id(t.inner): t for t in ours}
        return pytree.tree_map_only(torch.Tensor, lambda t: known[id(t)] if id(t) in known else on_gpu(t), found)

    def _watch(self, func: Any, tensors: list[Any], ours: list[Any], target: torch.device, kwargs: Any) -> None:
        op = func.overloadpacket
        name = op.__name__
        if not ours and target.type != "cuda":
            return
        if op in COPIES:
            to_gpu = isinstance(tensors[0], OnGpu) if op is aten.copy_ else target.type == "cuda"
            if to_gpu != isinstance(tensors[-1], OnGpu) and not (to_gpu and is_free(op, tensors[-1])):
                self.waits[f"{name} to the {'device' if to_gpu else 'host'}"] += 1
            return
        assert all(isinstance(t, OnGpu) or t.dim() == 0 for t in tensors), f"{name} of tensors of two devices"
        masked = op in INDEXED and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
        grows = op is aten.repeat_interleave and kwargs.get("output_size") is None
        if op in READS or op in SIZES or masked or grows:
            self.waits[name + " by a mask" * masked] += 1
        if op in ATOMIC and tensors[0].is_floating_point():
            self.atomics[name] += 1


def is_free(op: Any, source: torch.Tensor) -> bool:
    """Whether the host goes on while a source of its own is copied."""
    # Pinned memory; and a number of Python's, as in y[0] = 1, which is a tensor here and a kernel's argument on a GPU.
    return source.is_pinned() or (op is aten.copy_ and source.dim() == 0)


class OnGpu(torch.Tensor):
    """A tensor that says it lies on the device; `inner` holds it."""

    inner: torch.Tensor
    device = property(lambda self: NAME)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the device's block")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"{self.inner!r} on {NAME}"

    # To C++ these tensors lie on the CPU, so what leads there does not reach the dispatcher.
    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type == "cuda":
            return self if dtype is None else super().to(dtype)
        copied = torch.ops.aten._to_copy(self, device=device)
        return copied if dtype is None else copied.to(dtype)

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.to("cpu")

    def numpy(self) -> Any:  # type: ignore[override]
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.tensor(data, **({"dtype": self.dtype, "device": NAME} | kwargs))


def on_gpu(t: torch.Tensor) -> OnGpu:
    found = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        OnGpu, t.shape, strides=t.stride(), storage_offset=t.storage_offset(), dtype=t.dtype, device="cpu"
    )
    found.inner = t
    return found


def inner(value: Any) -> Any:
    """What a kernel or an operation on the CPU takes in the value's place."""
    if isinstance(value, TensorDescriptor):
        return dataclasses.replace(value, base=inner(value.base))
    return value.inner if isinstance(value, OnGpu) else value


@contextlib.contextmanager
def device() -> Iterator[Gpu]:
    """The device is there for the block. Its architecture is the interpreter's."""
    gpu = Gpu()
    with pytest.MonkeyPatch.context() as patch, gpu:
        _patch_torch(patch)
        _patch_launches(patch, gpu)
        yield gpu


def _patch_torch(patch: pytest.MonkeyPatch) -> None:
    tensor = torch.tensor

    def made(data: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> torch.Tensor:
        found = tensor(data, dtype=dtype, **kwargs)
        return found if device is None else found.to(device)

    # On a GPU no mode looks on, and a call goes past the dispatcher.
    patch.setattr(registered, "looked_at", lambda args: False)
    # In C++ it copies past the dispatcher.
    patch.setattr(torch, "tensor", made)
    # A module's parameters are replaced by .to(), not given other memory, which `inner` would not learn of.
    patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    patch.setattr(torch.cuda, "get_device_name", lambda device=None: "nothing that is known")
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: None)
    patch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(multi_processor_count=4))
    triton_launch.processors.cache_clear()


def _patch_launches(patch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    launch = interpreter.GridExecutor.__call__

    def unwrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        assert all(isinstance(t, OnGpu) for t in tensors), f"{self.fn.__name__} was given a tensor on the CPU"
        gpu.launches[self.fn.__name__] += 1
        with gpu_off():
            return launch(self, *map(inner, args), **{name: inner(value) for name, value in kwargs.items()})

    def gpu_off() -> Any:
        return torch.utils._python_dispatch._disable_current_modes()

    patch.setattr(interpreter.GridExecutor, "__call__", unwrapped)
