"""A tensor's memory as bytes."""

import numpy as np
import torch


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor's whole storage, shared with it."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),)).numpy()


def tensor_over(raw: np.ndarray, dtype: torch.dtype, offset: int, shape: list[int], strides: list[int]) -> torch.Tensor:
    """A tensor on bytes, offset in elements."""
    storage = torch.from_numpy(raw).untyped_storage()
    return torch.empty(0, dtype=dtype).set_(storage, offset, shape, strides)
