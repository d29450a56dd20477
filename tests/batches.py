"""What a test most often wants of a source's batches: their x."""

from collections.abc import Iterable
from itertools import islice

from torch import Tensor

from saefast.data.source import Batch


def xs(batches: Iterable[Batch], n: int | None = None) -> list[Tensor]:
    """The x of the first n batches, or of all."""
    return [batch["x"] for batch in islice(batches, n)]
