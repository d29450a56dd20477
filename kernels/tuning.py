"""The launch settings of every kernel, checked in: the same settings give the same bits from run to run.

The numbers below were chosen from what the compiler reports (registers, shared memory, spills: tests/test_aot.py) and
from published measurements of like kernels, or measured on an H100 where it says so. `SAEFAST_AUTOTUNE=1` times the
candidates of each op on the device at hand, once per process and shape class, and prints the line to check in here.
"""

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

Config = TypeVar("Config")


class Tiles(NamedTuple):
    """encode_tiles: tile sizes, warps, pipeline stages, and persistent programs per SM (0: the pointer form)."""

    block_b: int
    block_l: int
    block_d: int
    warps: int
    stages: int
    per_sm: int


class Merge(NamedTuple):
    """merge_topk: groups looked at in one go when compacting (block_g) and when filtering values (visit)."""

    block_g: int
    visit: int
    warps: int
    registers: int


class Spmm(NamedTuple):
    block_d: int
    unroll: int
    warps: int


class Sddmm(NamedTuple):
    block_k: int
    block_d: int
    warps: int


class DecodeLoss(NamedTuple):
    block_k: int
    block_d: int
    warps: int


class BatchSums(NamedTuple):
    """batch_sums: rows a program adds up, how many are on their way at once, columns."""

    rows: int
    unroll: int
    block_d: int
    warps: int


class Rows(NamedTuple):
    """row_update and the kernels beside it."""

    block_d: int
    unroll: int
    warps: int


# Widest D served by the first setting of a pair; beyond it the second. Two CTAs per SM overlap one's epilogue with the
# other's products, which counts where D is small; the larger tile reads its operands less often. On an H100, with the
# next tile's operands loaded during the epilogue, it is the faster one at D = 768 too: 0.333 ms against 0.397.
NARROW = 1024

# (architecture, kind of product) -> (narrow, wide). Architecture 0 is the interpreter on a CPU.
TILES: dict[tuple[int, str], tuple[Tiles, Tiles]] = {
    (0, "half"): (Tiles(16, 128, 64, 4, 1, 0),) * 2,
    (0, "tf32"): (Tiles(16, 128, 64, 4, 1, 0),) * 2,
    (0, "ieee"): (Tiles(16, 128, 64, 4, 1, 0),) * 2,
    (80, "half"): (Tiles(128, 128, 32, 8, 4, 0), Tiles(128, 128, 64, 8, 3, 0)),
    (80, "tf32"): (Tiles(128, 128, 32, 8, 3, 0),) * 2,
    (80, "ieee"): (Tiles(128, 128, 16, 8, 3, 0),) * 2,
    (89, "half"): (Tiles(128, 128, 32, 8, 4, 0),) * 2,
    (89, "tf32"): (Tiles(128, 128, 32, 8, 2, 0),) * 2,
    (89, "ieee"): (Tiles(128, 128, 16, 8, 3, 0),) * 2,
    (90, "half"): (Tiles(128, 256, 64, 8, 3, 1),) * 2,
    (90, "tf32"): (Tiles(128, 128, 32, 8, 3, 1), Tiles(128, 256, 32, 8, 3, 1)),
    (90, "ieee"): (Tiles(128, 128, 16, 8, 3, 0),) * 2,
    (100, "half"): (Tiles(128, 128, 64, 4, 3, 2), Tiles(128, 256, 64, 8, 3, 1)),
    (100, "tf32"): (Tiles(128, 128, 32, 8, 3, 1), Tiles(128, 256, 32, 8, 3, 1)),
    (100, "ieee"): (Tiles(128, 128, 16, 8, 3, 0),) * 2,
    (120, "half"): (Tiles(128, 128, 32, 8, 4, 0),) * 2,
    (120, "tf32"): (Tiles(128, 128, 32, 8, 2, 0),) * 2,
    (120, "ieee"): (Tiles(128, 128, 16, 8, 3, 0),) * 2,
}

# Scaling and counting hold more per value; with these the descriptor form still does so without spills.
LEAN_TILES = {"half": Tiles(128, 128, 64, 8, 3, 1), "tf32": Tiles(128, 128, 32, 8, 3, 1)}

# What descriptors cannot address (a row stride that is no multiple of 16 bytes, a list of latents) takes pointers.
POINTER_TILES = {"half": Tiles(128, 128, 32, 8, 4, 0), "tf32": Tiles(128, 128, 32, 8, 3, 0)}

# encode_topk's method for a GPU: (architecture, kind of product) -> (narrow, wide).
#
# half. Measured on an H100 with B = 8192 (bench/NOTES.md): the fused kernel's main loop is as fast as the library's at
# D = 4096 and 0.75 of it at 768; with merges 1.16 and 1.8 of the product alone. Library products of 1024 columns pay
# for their gaps and a filter kernel each: 1.43 and 2.5.
# ieee. tl.dot has no tensor cores for it and reaches perhaps half of the library's rate (not measured), while the
# filter is 8 % of a library product at D = 768 (22 us on 258) and 2 % at 4096.
# tf32. Tensor cores that read fp32 from shared memory cut its last bits off, where the library rounds them: sums lean
# towards 0, by 2**-10 of themselves (measured: three times the library's error).
# The interpreter runs the fused form.
METHODS: dict[tuple[int, str], tuple[str, str]] = {
    (arch, kind): ("chunked", "chunked") if kind != "half" and arch else ("fused", "fused") for arch, kind in TILES
}

# The part of x that tiles pass over before they go on to the next span of rows; it should stay in L2 beside W_enc.
SPAN_BYTES = 24 << 20
# Columns per group: halves the scratch written, doubles the group maxima; past this many columns those weigh more.
MANY_COLUMNS = 1 << 18
# merge_topk sorts its row's best in registers, up to this many; a larger k takes torch.sort.
MERGE_MAX_K = 2048
# Group maxima merge_topk may sort for the first chunk's bound.
BOUND_MAX_GROUPS = 4096


def architecture(capability: tuple[int, int] | None) -> int:
    """The architecture whose settings serve a compute capability; 0 for no GPU."""
    if capability is None:
        return 0
    found = capability[0] * 10 + capability[1]
    known = sorted({arch for arch, _ in TILES if arch})
    # 8.6 has 8.9's shared memory, not 8.0's.
    return 89 if 80 < found < 90 else max((arch for arch in known if arch <= found), default=known[0])


def product_kind(itemsize: int, precision: str) -> str:
    return "half" if itemsize == 2 else precision


def tiles(arch: int, kind: str, D: int, plain: bool = True) -> Tiles:
    """Settings of encode_tiles; `plain` when it neither scales nor counts."""
    config = TILES[arch, kind][D > NARROW]
    return config if plain or not config.per_sm else LEAN_TILES[kind]


def pointer_tiles(arch: int, kind: str, D: int) -> Tiles:
    """Settings of the pointer form, also where the descriptor form is the rule."""
    config = TILES[arch, kind][D > NARROW]
    return POINTER_TILES[kind] if config.per_sm else config


def group(columns: int) -> int:
    return 32 if columns <= MANY_COLUMNS else 64


def merge(width: int, group: int) -> Merge:
    """Settings for lists of `width` keys (a power of two): four values a thread at a time.

    One warp for 64 keys took 0.135 ms on an H100 where two took 0.16. Registers are given because the compiler, left
    alone, spills a few to reach an occupancy it aims at.
    """
    warps = min(8, max(1, width // 64))
    return Merge(256 * warps, 128 * warps // group, warps, 128 if width <= 512 else 168)


def spmm(D: int) -> Spmm:
    """A thread loads 16 bytes of a 2-byte row; a block never spans more than it must."""
    block = min(1024, max(32, _power_of_2(D)))
    return Spmm(block, 8, max(1, block // 256))


def sddmm(D: int, k: int) -> Sddmm:
    block_d = min(512, max(32, _power_of_2(D)))
    return Sddmm(min(8, _power_of_2(k)), block_d, max(1, min(4, block_d // 128)))


def decode_loss(D: int, k: int, planes: int = 1) -> DecodeLoss:
    """All k rows of a block of columns in registers: 32 fp32 a thread, so few columns where k is large.

    Of one plane, 64 columns in as few warps as that takes: many small programs hide each other's waits. On an H100 half
    as many warps and columns as before took 0.69 of the time at (4096, k = 64) and 0.71 at (768, k = 32), in bf16 0.65
    and 0.51. Half the registers where there are several residual planes, whose sums want some too.
    """
    block_k = _power_of_2(k)
    several = 4 if block_k < 64 else 8 if block_k < 256 else 16
    warps = several if planes > 1 else min(16, max(1, block_k // 16))
    # 512 columns of 4 or 8 rows spill a few words on sm_80 and sm_90.
    block_d = max(1, min(256, warps * (1024 if planes == 1 else 512) // block_k))
    return DecodeLoss(block_k, min(block_d, max(16, _power_of_2(D))), warps)


def decode_loss_csr(D: int, planes: int = 1) -> DecodeLoss:
    """Entries a few at a time, as `decode_loss`: 32 fp32 a thread, 16 where there are several residual planes."""
    block_d = min(256, max(32, _power_of_2(D)))
    return DecodeLoss(16, block_d, max(1, block_d // (64 if planes == 1 else 32)))


def batch_sums(D: int) -> BatchSums:
    """Four columns a thread; as many rows as leave the partial sums a small share of the batch's bytes."""
    block = min(256, max(32, _power_of_2(D)))
    return BatchSums(128, 8, block, max(1, block // 128))


# Entries that one program of fill_entries writes, and rows that one of mark_rows marks.
ENTRIES = 1024
# Keys that one program of select_kth looks at.
SELECT_KEYS = 2048
# Entries of a group that sum_groups adds at a time.
SUMMED = 32
# Entries of a group that one program adds up; part of the order of additions, so of the bits.
CUT = 256
# Widest row that one program of row_update holds whole.
MAX_ROW = 8192
# Widest whole row of which a thread holds 8 columns; wider, it holds 16.
WIDE = 2048
# Given, because the compiler left alone spills a few in settle_rows to reach an occupancy it aims at (as for Merge).
ROW_REGISTERS = 128


def rows(D: int, whole: bool) -> Rows:
    """Up to 8 columns a thread, two loads of 16 bytes; 16 where a wide row must be held whole, and fewer at a time."""
    block = max(32, _power_of_2(D)) if whole else min(1024, max(32, _power_of_2(D)))
    wide = block > WIDE
    return Rows(block, 2 if wide else 4, max(1, block // (512 if wide else 256)))


def pieces(D: int) -> Rows:
    """Of piece_sums: as many columns as leave a batch's part of them, 16 MB at B = 8192, room in L2."""
    block = min(512, max(32, _power_of_2(D)))
    return Rows(block, 4, max(1, block // 256))


def method(arch: int, kind: str, D: int, wide: bool = True) -> str:
    """The checked-in method; the library's where operands are not `wide`, loaded 16 bytes at a time."""
    return METHODS[arch, kind][D > NARROW] if wide or not arch else "chunked"


def tiles_candidates(arch: int, kind: str, default: Tiles) -> list[Tiles]:
    """What autotuning tries for encode_tiles; those that do not fit the device fail to launch and are passed over."""
    depth = {"half": 64, "tf32": 32, "ieee": 16}[kind]
    blocks = [(128, 128), (128, 256), (64, 128), (64, 256)]
    shapes = [
        Tiles(b, latents, d, warps, stages, per_sm)
        for b, latents in blocks
        for d in (depth, depth // 2)
        for warps in (4, 8)
        for stages in (2, 3, 4)
        for per_sm in ((1, 2) if default.per_sm else (0,))
    ]
    return [default, *(shape for shape in shapes if shape != default)]


def merge_candidates(default: Merge, group: int) -> list[Merge]:
    warps = [w for w in (1, 2, 4, 8) if default.warps <= 2 * w and w <= 2 * default.warps]
    shapes = [
        Merge(block * w, max(1, values * w // group), w, registers)
        for w in warps
        for block in (128, 256)
        for values in (64, 128, 256)
        for registers in dict.fromkeys((default.registers, 168))
    ]
    return list(dict.fromkeys([default, *shapes]))


def decode_loss_candidates(default: DecodeLoss) -> list[DecodeLoss]:
    shapes = [
        DecodeLoss(default.block_k, d, w)
        for d in (default.block_d // 4, default.block_d // 2, default.block_d, 2 * default.block_d)
        for w in (default.warps // 2, default.warps, 2 * default.warps)
        if d >= min(16, default.block_d) and 1 <= w <= 16
    ]
    return list(dict.fromkeys([default, *shapes]))


def rows_candidates(default: Rows, whole: bool) -> list[Rows]:
    """To try for `rows`. A block that holds a whole row keeps its width: sums over it belong to the update."""
    blocks = {default.block_d} | (set() if whole else {256, 512, 1024})
    shapes = [
        Rows(block, unroll, warps)
        for block in sorted(blocks)
        for unroll in (2, 4, 8)
        for warps in dict.fromkeys(max(1, block // columns) for columns in (1024, 512, 256, 128))
        if warps <= 16
    ]
    return list(dict.fromkeys([default, *shapes]))


def spmm_candidates(default: Spmm) -> list[Spmm]:
    shapes = [Spmm(b, u, max(1, b // e)) for b in (256, 512, 1024) for u in (4, 8, 16) for e in (256, 128)]
    return list(dict.fromkeys([default, *shapes]))


def sddmm_candidates(default: Sddmm) -> list[Sddmm]:
    shapes = [Sddmm(k, d, w) for k in (4, 8, 16) for d in (256, 512) for w in (1, 2, 4)]
    return list(dict.fromkeys([default, *shapes]))


_chosen: dict[tuple[Any, ...], Any] = {}


def autotuning() -> bool:
    return os.environ.get("SAEFAST_AUTOTUNE") == "1"


def chosen(key: tuple[Any, ...], default: Config) -> Config:
    """What autotuning found in this process for `key`; the default where none did."""
    found: Config = _chosen.get(key, default)
    return found


def autotune(
    key: tuple[Any, ...],
    candidates: Iterable[Config],
    run: Callable[[Config], object],
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> Config:
    """The fastest of the candidates for `key` (op, architecture, shape class), timed once per process.

    Prints every candidate's time and the winner, which is for a person to check in above: settings found at run time
    would change bits between runs. `clock` maps a function to milliseconds, triton's do_bench unless given.
    """
    if key in _chosen:
        return _chosen[key]
    if clock is None:
        from triton.testing import do_bench

        clock = do_bench
    times: dict[Config, float] = {}
    for config in candidates:
        try:
            times[config] = clock(lambda config=config: run(config))  # type: ignore[misc]
        except Exception as error:  # out of registers or shared memory on this device: not a candidate
            print(f"saefast autotune {key}: {config} failed: {type(error).__name__}", file=sys.stderr)  # noqa: T201
    if not times:
        raise RuntimeError(f"no candidate of {key} runs on this device")
    best = min(times, key=lambda config: times[config])
    for config, ms in sorted(times.items(), key=lambda item: item[1]):
        print(f"saefast autotune {key}: {ms:9.4f} ms  {config}", file=sys.stderr)  # noqa: T201
    print(f"saefast autotune {key}: check in {best}", file=sys.stderr)  # noqa: T201
    _chosen[key] = best
    return best


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
