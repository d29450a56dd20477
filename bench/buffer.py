"""Shuffled batches: rows per second out of the buffer against what people use instead, all in one run.

    python -m bench.buffer [--device cpu|cuda] [--out DIR] [--quick] [--no-check]

bf16 shards in the page cache, d = 768 and 2304, batches of 4096 and 8192 rows, drawn in turn (the first turns are not
timed) from:
    buffer         ShardBuffer: reservoir in C++, two copies per row, bounded memory
    mapped         the shard source that draws from the whole folder at random (`shuffle="mapped"`)
    index_select   torch.index_select on a tensor that lies in memory already
    dataloader     torch DataLoader, shuffle=True, over a numpy memmap of the same rows
Then what shuffling is worth: the loss of an SAE on data sorted by direction, against the reservoir's size.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench import common
from saefast.data.mapped_source import MappedSource
from saefast.data.opening import open_source
from saefast.data.reservoir import LAG, PREFETCH
from saefast.data.shard_buffer import ShardBuffer
from saefast.data.shard_writer import ShardWriter
from saefast.engines.config import TrainConfig
from saefast.models.config import SAEConfig
from saefast.training.api import train

# A batch of 8192 rows of 2304 is over 32 MiB, which malloc asks of the kernel, and gives back, every time.
BATCHES = (4096, 8192)
BATCH = BATCHES[0]
STORED = torch.bfloat16
# Seconds between turns: the buffer reads a few batches ahead when its own is over.
PAUSE = 0.1


class Sizes(NamedTuple):
    """How much of it all."""

    widths: tuple[int, ...]
    batches: tuple[int, ...]
    data_bytes: int
    drawn: int
    """Batches a round."""
    rounds: int
    sorted_rows: int
    memory_rows: int


FULL = Sizes((768, 2304), BATCHES, 1 << 29, 200, 7, 1 << 17, 1 << 18)
QUICK = FULL._replace(data_bytes=1 << 27, drawn=50, rounds=3, sorted_rows=1 << 15)
TINY = Sizes((32,), (256,), 1 << 21, 4, 1, 1 << 11, 1 << 16)


def write_shards(folder: Path, rows: Iterator[Tensor]) -> None:
    """A shard folder of the pieces of rows (n, d) given, one shard each, in their order."""
    hooks = [{"name": "x", "hf_name": "x"}]
    with ShardWriter(folder, hooks, "bfloat16", shuffle_seed=None, products=False) as writer:
        for number, part in enumerate(rows):
            n = len(part)
            writer.add_sequences(number, [number], [[0]])
            writer.add("train", {"x": part}, torch.full((n,), number), torch.zeros(n, dtype=torch.int16))
            writer.commit({}, complete=True)


class MemmapRows(torch.utils.data.Dataset[Tensor]):
    """What people write for activations on disk: a row per index, out of a numpy memmap."""

    def __init__(self, file: Path, d: int) -> None:
        self.rows = np.memmap(file, np.int16, mode="r").reshape(-1, d)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor:
        return torch.from_numpy(self.rows[i].copy()).view(STORED)


def contenders(folder: Path, d: int, n: int, batch: int, device: str) -> dict[str, Callable[[], Iterator[object]]]:
    """Endless batches of each kind, by name."""
    mapped = open_source(folder, shuffle="mapped")
    assert isinstance(mapped, MappedSource)
    in_memory = torch.cat([segment.rows for segment in mapped.train["x"].segments])
    flat = folder / "flat.bin"
    in_memory.view(torch.int16).numpy().tofile(flat)

    def selected() -> Iterator[Tensor]:
        while True:
            for index in torch.randperm(n).split(batch)[: n // batch]:
                yield in_memory.index_select(0, index)

    def loaded() -> Iterator[Tensor]:
        loader = torch.utils.data.DataLoader(MemmapRows(flat, d), batch, shuffle=True, drop_last=True)
        while True:
            yield from loader

    buffer = ShardBuffer(mapped, reservoir_rows=max(1 << 16, (LAG + 2) * batch), reuse_memory=True)
    return {
        "buffer": lambda: buffer.batches(batch, 0, device, STORED),
        "mapped": lambda: open_source(folder, shuffle="mapped").batches(batch, 0, device, STORED),
        "index_select": selected,
        "dataloader": loaded,
    }


def speed(d: int, batch: int, device: str, sizes: Sizes) -> list[dict[str, object]]:
    """GB/s of rows of each contender, rounds interleaved."""
    n = sizes.data_bytes // (2 * d) // batch * batch
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "acts"
        write_shards(path, (torch.randn(part, d) for part in split(n, 1 << 16)))
        streams = {name: make() for name, make in contenders(path, d, n, batch, device).items()}
        # A DataLoader takes a second for what the others do in milliseconds; fewer batches measure it as well.
        batches = {name: (2 if name == "dataloader" else sizes.drawn) for name in streams}
        seconds: dict[str, list[float]] = {name: [] for name in streams}
        for number in range(1 + sizes.rounds):
            for name, stream in streams.items():
                time.sleep(PAUSE)
                start = time.perf_counter()
                drain(stream, batches[name], device)
                if number > 0:
                    seconds[name].append(time.perf_counter() - start)
        rows = []
        for name, taken in seconds.items():
            spread, size = common.spread(taken), batches[name] * batch * d * STORED.itemsize / 1e9
            rate = {"GB/s": size / spread.median, "low": size / spread.p80, "high": size / spread.p20}
            rows.append({"d": d, "batch": batch, "what": name} | rate)
        return rows


def drain(batches: Iterator[object], n: int, device: str) -> None:
    for _ in islice(batches, n):
        pass
    if device == "cuda":
        torch.cuda.synchronize()


def split(n: int, size: int) -> Iterator[int]:
    yield from [size] * (n // size)
    if n % size:
        yield n % size


def sorted_rows(n: int, d: int) -> Tensor:
    """Rows made of a few directions at a time, sorted by which: neighbours share their features, as in real text."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(4 * d, d, generator=generator), dim=1)
    topics = torch.arange(n) * (len(atoms) - 16) // n
    picks = topics[:, None] + torch.randint(0, 16, (n, 8), generator=generator)
    weights = torch.rand(n, 8, generator=generator) + 0.5
    return torch.einsum("nk,nkd->nd", weights, atoms[picks])


def loss_by_reservoir(n: int) -> list[dict[str, object]]:
    """Held-out FVU of a small SAE on sorted data, trained through reservoirs of several sizes."""
    d, batch = 64, 256
    rows = sorted_rows(n + n // 16, d)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    held = rows[order[: n // 16]]
    kept = rows[order[n // 16 :].sort().values]
    out: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "acts"
        write_shards(path, iter(kept.split(1 << 13)))
        mapped = open_source(path, shuffle="mapped")
        assert isinstance(mapped, MappedSource)
        sizes = [(LAG + 2) * batch * 4**i for i in range(4)]
        for size in [*sizes, None]:
            source = mapped if size is None else ShardBuffer(mapped, reservoir_rows=size)
            config = TrainConfig(batch_size=batch, n_tokens=2 * len(kept), lr=2e-3, save_every=0, device="cpu")
            sae = train(source, SAEConfig(d_in=d, n_latents=4 * d, k=8), config)
            with torch.no_grad():
                error = (held - sae(held).x_hat).square().sum() / (held - held.mean(0)).square().sum()
            out.append({"reservoir_rows": size or len(kept), "of": len(kept), "heldout_fvu": float(error)})
    return out


def memory(d: int, n: int) -> dict[str, object]:
    """Memory that drawing adds in a fresh process, against reservoir + ring."""
    draw = (
        "import sys; from bench import common; from bench.buffer import *\n"
        "mapped = open_source(sys.argv[1], shuffle='mapped')\n"
        "buffer = ShardBuffer(mapped, reservoir_rows=int(sys.argv[2]), reuse_memory=True)\n"
        "print(common.peak_bytes(lambda: drain(buffer.batches(BATCH, 0, 'cpu', STORED), 200, 'cpu'), 'cpu'))\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "acts"
        write_shards(path, (torch.randn(part, d) for part in split(n, 1 << 14)))
        child = subprocess.run(
            [sys.executable, "-c", draw, str(path), str(n // 2)], cwd=common.ROOT, capture_output=True, text=True
        )
    if child.returncode:
        raise SystemExit(child.stderr)
    promised = (n // 2 + PREFETCH * BATCH) * d * STORED.itemsize
    return {"d": d, "grown_bytes": int(child.stdout), "reservoir_and_ring_bytes": promised}


def main(argv: list[str] | None = None) -> int:
    args = common.arguments("bench.buffer", __doc__, argv)
    if not args.no_check:
        common.check(args.device, "data/test_buffer.py")
    sizes = TINY if args.rehearse else QUICK if args.quick else FULL
    parts: dict[str, common.Call] = {
        f"speed {d} {batch}": partial(speed, d, batch, args.device, sizes)
        for d in sizes.widths
        for batch in sizes.batches
    }
    parts |= {f"memory {d}": partial(memory, d, sizes.memory_rows) for d in sizes.widths}
    parts["loss_by_reservoir"] = partial(loss_by_reservoir, sizes.sorted_rows)
    results: dict[str, list[object]] = {}
    failed = False
    for name, part in parts.items():
        rows = common.attempt(name, part)
        failed |= rows is None
        if rows is not None:
            print(f"\n{name}")
            common.print_table(rows)
            results.setdefault(name.split()[0], []).extend(rows if isinstance(rows, list) else [rows])
    common.write_results(args.out, args.device, "buffer", results)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
