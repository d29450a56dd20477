"""Writing the .pt files of others: a dictionary of tensors by torch.save, whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from saefast.files import replacing


def write_pt(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """What torch.load gives back as a state_dict; a tensor that is transposed is written as it lies, without a copy."""
    with replacing(path) as temporary:
        torch.save({name: _alone(tensor) for name, tensor in tensors.items()}, temporary)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor on the CPU with no bytes around it, for torch.save writes all that a tensor is a view of."""
    tensor = tensor.detach().cpu()
    own = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if own else tensor.clone()
