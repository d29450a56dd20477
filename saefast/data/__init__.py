"""Activations on disk and in memory: shard folders, sources of batches, the shuffle buffer."""

from saefast.data.buffer import ShardBuffer
from saefast.data.gather import RowTable, gather_rows
from saefast.data.shard_writer import ShardWriter
from saefast.data.shards import ShardFolder
from saefast.data.source import Source
from saefast.data.sources import open_source

__all__ = ["RowTable", "ShardBuffer", "ShardFolder", "ShardWriter", "Source", "gather_rows", "open_source"]
