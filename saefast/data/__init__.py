"""Activations on disk and in memory: shard folders, sources of batches, the shuffle buffer."""

from saefast.data.gather import RowTable, gather_rows
from saefast.data.opening import open_source
from saefast.data.shard_buffer import ShardBuffer
from saefast.data.shard_writer import ShardWriter
from saefast.data.shards import ShardFolder
from saefast.data.source import Source

__all__ = ["RowTable", "ShardBuffer", "ShardFolder", "ShardWriter", "Source", "gather_rows", "open_source"]
