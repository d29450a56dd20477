"""Makes Triton's interpreter quick enough for a test suite, without changing what it computes.

It runs reductions with a combine function of one's own in Python, at some 50 µs an element, and `tl.sort` is made of
such reductions: for the two that the kernels use numpy has the very function as a ufunc (test_encode_topk_triton.py
holds one against the other). It looks for functions to patch at every call of a device function, and copies every
tensor onto itself after each launch, which touches all of a large one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from saefast.kernels import encode_tiles

INTERPRETED = not isinstance(encode_tiles.tiles_pointer, triton.JITFunction)


def speed_up() -> None:
    """Idempotent. Does nothing where kernels are compiled."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    if not hasattr(interpreter.ReduceOps, "slow_reduce"):
        interpreter.patch_always = interpreter._patch_lang
        _reduce_by_ufunc(interpreter)
        if hasattr(interpreter, "_LangPatchScope"):  # Triton 3.5 and later
            _patch_once_a_launch(interpreter)
        _skip_copies_onto_self()


def _reduce_by_ufunc(interpreter: Any) -> None:
    # np.maximum propagates NaN, as PropagateNan.ALL does.
    ufuncs = {encode_tiles.nan_max: np.maximum, tl.standard._xor_combine: np.bitwise_xor}
    slow = interpreter.ReduceOps.generic_reduce

    def reduce(self: Any, input: tuple[tl.tensor, ...]) -> Any:
        ufunc = ufuncs.get(self.combine_fn)
        if ufunc is None or self.axis is None or len(input) != 1:
            return slow(self, input)
        data = ufunc.reduce(input[0].handle.data, axis=self.axis, keepdims=bool(self.keep_dims))
        return [self.to_tensor(data, input[0].dtype)]

    interpreter.ReduceOps.slow_reduce, interpreter.ReduceOps.generic_reduce = slow, reduce


def _patch_once_a_launch(interpreter: Any) -> None:
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[tuple[int, ...]] = set()

    def patch_once(fn: Any) -> Any:
        modules = tuple(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
        if modules in patched:
            return interpreter._LangPatchScope()
        patched.add(modules)
        return patch(fn)

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh


def _skip_copies_onto_self() -> None:
    copy = torch.UntypedStorage.copy_

    def copy_unless_same(self: Any, source: Any, *args: Any) -> Any:
        return self if self.data_ptr() == source.data_ptr() else copy(self, source, *args)

    torch.UntypedStorage.copy_ = copy_unless_same  # type: ignore[method-assign]


@contextmanager
def language_patched() -> Iterator[None]:
    """The patches a launch makes to triton.language, for calling a device function outside one."""
    from triton.runtime import interpreter

    scope = interpreter.patch_always(encode_tiles.nan_max.fn)
    try:
        yield
    finally:
        if scope is not None:
            scope.restore()
