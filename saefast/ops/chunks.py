"""How the GPU encoder cuts a batch to its scratch memory: rows taken at once, and chunks of latents.

Arithmetic alone, so that `saefast plan` says on any machine what `triton_encode_topk` will allocate.
"""

from collections.abc import Iterator
from typing import NamedTuple

from saefast.errors import InputError
from saefast.kernels import tuning

# Bytes per candidate where torch sorts: fp32 value, rank, keys of 8 bytes and what sorting them takes.
SORT_BYTES = 64
# Rows of a batch that a library product and torch's top-k take at a time without losing speed.
SORT_ROWS = 256


class Cut(NamedTuple):
    """How a batch is cut. Columns are latents, or places in a list of latents; widths are multiples of the group."""

    rows: int
    """Rows taken at once."""
    first: int
    """Columns of the first chunk."""
    widest: int
    """Columns of the widest chunk that comes up."""
    product: int
    """Columns that a library product makes at a time; 0 where a kernel multiplies."""


def cut_topk(
    B: int, columns: int, k: int, budget: int, *, block: int = 128, first: int | None = None, product: int = 0,
    copied: int = 0,
) -> Cut:  # fmt: skip
    """Cuts encode_topk of B rows over `columns` to `budget` bytes.

    Args:
        block: rows of a tile; fewer rows than that waste its work.
        first: width of the first chunk instead of max(4096, 64 k), which holds enough groups for a tight first bound.
        product: see `Cut`.
        copied: bytes copied for every column of a library product, because it is a row of a list.

    Raises:
        InputError: the budget does not hold one row and one group.
    """
    first = first or max(4096, 64 * k)
    return _cut(B, columns, budget, first, None, 8, _topk_bytes_per_row(columns, k), block, product, copied)


def cut_csr(B: int, columns: int, budget: int, *, block: int, first: int | None, product: int) -> Cut:
    """Cuts threshold_encode likewise. Its chunks are all as wide as the first, because nothing is learnt from one."""
    first = first or 1 << 16
    # A group has its count of hits (4 bytes) and their running sum (8).
    return _cut(B, columns, budget, first, first, 12, 8, block, product, 0)


def cut_sort(B: int, columns: int, k: int, budget: int) -> tuple[int, int]:
    """(rows, columns) taken at once where k is too large for the merge and torch sorts.

    As wide as can be with SORT_ROWS rows: with every chunk the k best so far are selected and sorted once more.

    Raises:
        InputError: the budget does not hold the k best of one row and as many new ones.
    """
    least = SORT_BYTES * (k + min(columns, max(4096, k)))
    if budget < least:
        raise InputError(f"max_scratch_bytes is {budget}: expected at least {least} to sort k = {k} for one row")
    rows = max(1, min(B, SORT_ROWS, budget // least))
    width = min(columns, budget // (SORT_BYTES * rows) - k)
    if width == columns:
        rows = max(1, min(B, budget // (SORT_BYTES * (k + columns))))
    return rows, width


def topk_bytes(cut: Cut, columns: int, k: int) -> int:
    """Bytes of scratch that encode_topk allocates for a cut: values and two numbers a group, keys and tau of a row."""
    width = 4 * cut.widest + 8 * (cut.widest // tuning.group(columns))
    return cut.rows * (width + _topk_bytes_per_row(columns, k))


def scratch_bytes(B: int, columns: int, k: int, budget: int) -> int:
    """Bytes of scratch, at most, that encode_topk allocates within a budget."""
    if k > tuning.MERGE_MAX_K:
        rows, width = cut_sort(B, columns, k, budget)
        return SORT_BYTES * rows * (k + width)
    return topk_bytes(cut_topk(B, columns, k, budget), columns, k)


def chunks(columns: int, cut: Cut) -> Iterator[tuple[int, int]]:
    """(start, width) of chunks that double in width up to the widest."""
    start, width = 0, cut.first
    while start < columns:
        n = min(width, columns - start)
        yield start, n
        start, width = start + n, min(2 * width, cut.widest)


def steady(columns: int, cut: Cut) -> tuple[int, int]:
    """The chunk that most of the work is like: the last of the widest. What it is compared with is known by then."""
    return max(chunks(columns, cut), key=lambda chunk: (chunk[1], chunk[0]))


def sorted_width(k: int) -> int:
    """Keys that the merge sorts for a row."""
    return max(32, 1 << (k - 1).bit_length())


def _topk_bytes_per_row(columns: int, k: int) -> int:
    group, width = tuning.group(columns), sorted_width(k)
    return 4 + 8 * (width + tuning.merge(width, group).visit * group)


def _cut(
    B: int, columns: int, budget: int, first: int, limit: int | None, per_group: int, per_row: int, block: int,
    product: int, copied: int,
) -> Cut:  # fmt: skip
    """Fits chunks into `budget` bytes: per value 4, per group of a row `per_group`, per row `per_row`."""
    B, group = max(1, B), tuning.group(columns)
    every = _up(columns, group)
    first, product = min(_up(first, group), every), min(product, every)
    while product > group and copied * product > budget // 2:
        product = max(group, product // 2 // group * group)
    left = budget - copied * product

    def afford(rows: int) -> int:
        return (left - rows * per_row) // (rows * (4 * group + per_group)) * group

    rows = B
    if afford(rows) < first:
        fit = left // (per_row + first * 4 + first // group * per_group)
        rows = min(B, max(block, fit // block * block))
    # Less than a block of rows wastes the tiles' work, so a narrower chunk comes first.
    while rows > 1 and afford(rows) < min(first, 8 * group):
        rows = (rows + 1) // 2
    widest = min(afford(rows), every, _up(limit or every, group))
    if widest > 1024:
        widest -= widest % 256 * (widest < every)  # whole tiles
    if widest < group:
        least = per_row + 4 * group + per_group + copied * group
        raise InputError(f"max_scratch_bytes is {budget}: expected at least {least} for one row and {group} latents")
    cut = Cut(rows, min(first, widest), widest, product)
    # Chunks may end before they have doubled to what the budget affords: no memory for widths that never come up.
    return cut._replace(widest=_up(_reached(columns, cut), group))


def _reached(columns: int, cut: Cut) -> int:
    """Width of the widest chunk that comes up."""
    reached = 0
    for _, n in chunks(columns, cut):
        reached = max(reached, n)
        if n == cut.widest:
            break
    return reached


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
