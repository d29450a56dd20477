"""Writing the .pt files of others: a dictionary of tensors, numbers and text by torch.save, whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saefast.files import replacing


def write_pt(path: Path, tensors: Mapping[str, Any]) -> None:
    """What torch.load gives back as a state_dict; a tensor that is transposed is written as it lies, without a copy."""
    found = {name: _alone(item) if isinstance(item, Tensor) else item for name, item in tensors.items()}
    # An open file, because torch.save writes a file's name into it, and this one's is made up.
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(found, file)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor on the CPU with no bytes around it, for torch.save writes all that a tensor is a view of."""
    tensor = tensor.detach().cpu()
    own = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if own else tensor.clone()
