"""saefast's sources of activations for other people's training loops: an iterator of tensors (B, d_in).

    batches = DataProvider("acts/", batch_size=4096, hook="layers.8")
    SAETrainer(cfg, sae, data_provider=batches)                  # SAELens
    trainSAE(data=batches, ...)                                  # dictionary_learning, which saves `batches.config` too

Rows are shuffled by the reservoir that `saefast.train` draws from (`saefast.data`), and read ahead by its threads.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saefast.data.opening import open_source
from saefast.data.provenance import facts_of
from saefast.data.source import X, first_bad_row, where_it_ends
from saefast.errors import InputError
from saefast.placement import pick_device, require_memory
from saefast.schema import Seed, check_argument
from saefast.typed import typed


class DataProvider:
    """Batches of `batch_size` rows, epoch after epoch without end, each to be written to as one likes.

    The batches of a generator end with it.

    Args:
        data: whatever `saefast.data.open_source` takes: a shard folder, activations that other libraries cached, a
            file, an array, an iterable of tensors, a Source.
        batch_size: rows of a batch.
        seed: of the order of the rows.
        device, dtype: of the batches.
        options: of open_source: hook, key, heldout, shuffle, shuffle_rows, ...

    Attributes:
        source: the Source.
        config: what is known of the data, as JSON holds it. dictionary_learning writes it beside the SAE.

    Raises:
        InputError: data that cannot be read; a batch_size below 1 or larger than memory; a device that is not there;
            while drawing, a row that holds NaN or inf.
    """

    @typed
    def __init__(
        self,
        data: Any,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: expected at least 1")
        check_argument("seed", seed, Seed)
        if not dtype.is_floating_point:
            raise InputError(f"dtype is {dtype}: expected a floating-point one")
        self.device = pick_device(str(device))
        self.source = open_source(data, **options)
        size = batch_size * self.d_in * dtype.itemsize
        require_memory(self.device, size, f"a batch of {batch_size} rows of {self.d_in} columns")
        self.batch_size, self.seed, self.dtype = batch_size, seed, dtype
        facts = facts_of(self.source)
        self.config: dict[str, Any] = {
            # dictionary_learning's names first, SAELens' after them.
            "d_submodule": self.d_in,
            "out_batch_size": batch_size,
            **({"ctx_len": facts["context_size"]} if "context_size" in facts else {}),
            "device": str(self.device),
            "seed": seed,
            "source": self.source.source_name,
            "n_rows": self.source.n_rows,
            **facts,
        }
        self._batches: Iterator[dict[str, Tensor]] | None = None

    @property
    def d_in(self) -> int:
        """Width of the rows."""
        return self.source.d_in

    def __iter__(self) -> "DataProvider":
        return self

    def __next__(self) -> Tensor:
        """The next (batch_size, d_in)."""
        if self._batches is None:
            self._batches = self.source.batches(self.batch_size, self.seed, self.device, self.dtype)
        x = next(self._batches)[X]
        if (row := first_bad_row(x)) is not None:
            where = self.source.describe_row(row)
            ends = where_it_ends(x[row], self.source.stored_dtype())
            raise InputError(f"row {row} of the batch holds NaN or inf: {where}; drop or repair that row{ends}")
        return x

    def heldout(self) -> Iterator[Tensor]:
        """The rows that are never drawn, once, in order: (at most batch_size, d_in)."""
        for batch in self.source.heldout(self.batch_size, self.device, self.dtype):
            yield batch[X]

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch drawn last, as JSON holds it."""
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next batch is the one after that position. Raises InputError for a position in other data."""
        self.source.load_state_dict(state)
        self._batches = None

    def close(self) -> None:
        """Ends the reading threads and frees their memory."""
        self._batches = None
        self.source.close()
