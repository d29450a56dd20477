"""Shard folders whose rows say which they are."""

import torch

from saefast.data.shard_writer import ShardWriter

D, N = 8, 1000


def rows_of(n, d=D):
    """Row r is (r, r + 1/4, ...): exact in fp32, and its number can be read off it."""
    return torch.arange(n, dtype=torch.float32)[:, None] + torch.arange(d) / 4


def write_folder(path, dtype="float32", rows_per_shard=300):
    hooks = [{"name": "h", "hf_name": "h"}]
    with ShardWriter(path, hooks, dtype, rows_per_shard=rows_per_shard, shuffle_seed=None) as writer:
        for start in range(0, N, rows_per_shard):
            rows = rows_of(N)[start : start + rows_per_shard]
            number = start // rows_per_shard
            writer.add_sequences(number, [number], [list(range(len(rows)))])
            writer.add("train", {"h": rows}, torch.full((len(rows),), number), torch.arange(len(rows)))
            writer.commit({}, complete=True)
    return path
