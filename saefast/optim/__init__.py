"""The optimisers' state, and the updates of single rows of it."""

from saefast.optim.dispatch import row_ops
from saefast.optim.state import AdamStep, LeanMatrix, Matrix

__all__ = ["AdamStep", "LeanMatrix", "Matrix", "row_ops"]
