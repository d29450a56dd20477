"""Picks the module whose row operations serve a matrix: `triton`, `native` or `reference`, of the same functions."""

from types import ModuleType

import torch
from torch import Tensor

from saefast.ops import backends
from saefast.optim import native, reference


def row_ops(w: Tensor) -> ModuleType:
    """The module for weights like w."""
    match backends.backend(w) if w.dtype in (torch.float32, torch.bfloat16) else "reference":
        case "triton":
            from saefast.optim import triton

            return triton
        case "native":
            return native
    return reference
