"""A launch moved to where rows would be if there were very many: addresses that 32 bits cannot tell apart.

Row numbers (in index tensors, in an integer, or the programs' own) are raised, and each pointer that they index starts
as many rows earlier, so that nothing exists but the far rows: no memory is needed, and a product taken in 32 bits lands
outside every buffer. `MOVES` says for every kernel what indexes what; a kernel that is not there fails the test.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

# Row numbers and entries are int32, places in a CSR result and a program's row times its width are int64.
ROWS, ENTRIES, PLACES, PROGRAM_ROWS = 100_000_000, 1_000_000_000, 5_000_000_000, 400_000_000


class Far:
    """A launch's arguments being moved."""

    def __init__(self, given: dict[str, Any], grid: int) -> None:
        # Tensors that share memory part here: one may be raised and the other not.
        self.given = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
        self.shifts: Counter[str] = Counter()
        self.first, self.grid, self.rows = 0, grid, 0
        self.raised: dict[str, int] = {}
        """Amounts by which numbers that are results are larger too."""

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name)

    def number(self, amount: int, *names: str) -> None:
        """Raises tensors of numbers (but not -1, which is none), integers, and the rows that a descriptor knows."""
        for name in names:
            value = self[name]
            if isinstance(value, torch.Tensor):
                value += amount * (value >= 0)
                self.raised[name] = amount
            elif isinstance(value, int):
                self.given[name] = value + amount
            elif value is not None:
                value.shape = [value.shape[0] + amount, *value.shape[1:]]

    def shift(self, rows: int, **widths: int) -> None:
        """Pointers start so many rows earlier. widths: elements a row."""
        for name, width in widths.items():
            if self[name] is not None:
                self.shifts[name] += rows * width

    def by_program(self, each: int = 1, rows: int = PROGRAM_ROWS, **widths: int) -> None:
        """The rows of programs, `each` of them for one row."""
        rows = min(rows, (1 << 31) // each - self.grid >> 8 << 8)
        self.first, self.rows = rows * each, rows
        self.shift(rows, **widths)

    @property
    def column_blocks(self) -> int:
        return -(-self["D"] // self["BLOCK_D"])

    @property
    def groups(self) -> int:
        return self["stride"] // self["GROUP"]


def move_spmm(f: Far) -> None:
    D, K, csr = f["D"], f["K"], f["row_ptr"] is not None
    f.number(ROWS, "idx_ptr")
    f.shift(ROWS, W_ptr=D)
    f.by_program(f.column_blocks, out_ptr=D, row_ptr=1, acts_ptr=0 if csr else K, idx_ptr=0 if csr else K)
    if csr:
        f.number(PLACES, "row_ptr")
        f.shift(PLACES, acts_ptr=1, idx_ptr=1)


def move_sddmm(f: Far) -> None:
    f.number(ROWS, "idx_ptr")
    f.shift(ROWS, W_ptr=f["D"])
    f.by_program(-(-f["K"] // f["BLOCK_K"]), x_ptr=f["D"], idx_ptr=f["K"], out_ptr=f["K"])


def move_decode_loss(f: Far) -> None:
    D, K = f["D"], f["K"]
    f.number(ROWS, "idx_ptr", *["bounds_ptr"] * bool(f["BY_LATENT"]))
    f.shift(ROWS, W_ptr=D)
    f.by_program(x_ptr=D, residual_ptr=D, error_ptr=D, acts_ptr=K, idx_ptr=K, grad_ptr=K, squares_ptr=1)


def move_decode_loss_csr(f: Far) -> None:
    D = f["D"]
    f.number(ROWS, "idx_ptr", *["bounds_ptr"] * bool(f["BY_LATENT"]))
    f.shift(ROWS, W_ptr=D)
    f.number(ENTRIES, "row_ptr")
    f.shift(ENTRIES, acts_ptr=1, idx_ptr=1, grad_ptr=1)
    f.by_program(x_ptr=D, residual_ptr=D, error_ptr=D, row_ptr=1, squares_ptr=1)


def move_tiles(f: Far) -> None:
    """Columns by `start`, rows of W by the list of latents where there is one, rows of x by the tile's number."""
    D = f["D"] or 0
    listed, counts = f["latents_ptr"] is not None, bool(f["COUNT"])
    f.number(ROWS, "start", "W_desc")
    f.shift(ROWS, W_desc=D, W_ptr=0 if listed else D, latents_ptr=1, bias_ptr=1, scale_ptr=1)
    if listed:
        f.number(ROWS, "latents_ptr")
        f.shift(ROWS, W_ptr=D)
    across = -(-f["n"] // f["BLOCK_L"])
    f.grid = across * -(-f["B"] // f["BLOCK_B"])
    rows = PROGRAM_ROWS // f["BLOCK_B"] * f["BLOCK_B"]
    f.shift(rows, x_ptr=D, x_desc=D, groups_ptr=f.groups, scratch_ptr=f["stride"], threshold_ptr=0 if counts else 1)
    f.shift(ROWS, threshold_ptr=f["threshold_step"] if counts else 0)
    f.first, f.given["span"] = rows // f["BLOCK_B"] * across, 1
    f.number(rows, "B", "x_desc")


def move_merge_topk(f: Far) -> None:
    K, keys = f["K"], (1 << f["LOG"]) + f["VISIT"] * f["GROUP"]
    f.number(ROWS, "start", "idx_ptr")
    f.shift(ROWS, scale_ptr=1)
    f.by_program(
        groups_ptr=f.groups, list_ptr=f.groups, scratch_ptr=f["stride"], keys_ptr=keys, acts_ptr=K, idx_ptr=K, tau_ptr=1
    )


def move_fill_csr(f: Far) -> None:
    f.number(ROWS, "start")
    f.raised["idx_ptr"] = ROWS
    f.shift(ROWS, threshold_ptr=f["threshold_step"])
    f.number(PLACES, "ends_ptr")
    f.shift(PLACES, idx_ptr=1, acts_ptr=1)
    f.by_program(-(-f.groups // f["VISIT"]), counts_ptr=f.groups, ends_ptr=f.groups, scratch_ptr=f["stride"])


def move_count_from(f: Far) -> None:
    block = f["BLOCK"]
    f.by_program(1, ENTRIES // block, keys_ptr=block, out_ptr=16)
    f.number(f.rows * block, "n")


def move_source(f: Far) -> None:
    """Entries, and the rows that they weigh: their own numbers where no tensor says which."""
    f.number(ENTRIES, "offsets_ptr")
    f.shift(ENTRIES, row_ptr=1, coef_ptr=1)
    f.number(ROWS, "row_ptr")
    f.shift(ENTRIES if f["row_ptr"] is None else ROWS, source_ptr=f["D"])


def move_piece_sums(f: Far) -> None:
    move_source(f)
    f.number(ROWS, "group_ptr", "n")
    f.shift(ROWS, offsets_ptr=1, first_ptr=1)
    f.by_program(f.column_blocks, group_ptr=1, out_ptr=f["D"])
    f.number(f.rows, "first_ptr")


def move_rows(f: Far) -> None:
    """Gradients by group, matrices by the groups' rows; group and row are one where no tensor says which."""
    if f["offsets_ptr"] is not None:
        move_source(f)
        f.number(ROWS, "first_ptr")
        f.shift(ROWS, pieces_ptr=f["D"])
    each = f.column_blocks
    f.by_program(
        each, offsets_ptr=1, first_ptr=1, along_ptr=f["ALONG"] or 0, rows_ptr=1, squares_ptr=each, out_ptr=f["D"]
    )
    f.number(ROWS, "rows_ptr")
    rows, D = f.rows if f["rows_ptr"] is None else ROWS, f["D"]
    lean = f["scale_ptr"] is not None
    f.shift(rows, w_ptr=D, m_ptr=D, shadow_ptr=D, norms_ptr=1, v_ptr=1 if lean else D, scale_ptr=f["BLOCKS"] or 0)
    f.shift(rows, last_ptr=1)


def move_mark_rows(f: Far) -> None:
    f.number(ROWS, "rows_ptr")
    f.shift(ROWS, last_ptr=1)


def move_batch_sums(f: Far) -> None:
    each = f.column_blocks
    rows, D = f["ROWS"], f["D"]
    f.by_program(each, PROGRAM_ROWS // rows, x_ptr=rows * D, shifted_ptr=D, spread_ptr=each, squares_ptr=each)
    f.number(f.rows * rows, "B")


def move_fill_entries(f: Far) -> None:
    block = f["BLOCK"]
    f.by_program(
        1, ENTRIES // block, order_ptr=block, dec_row_ptr=block, dec_coef_ptr=block, enc_row_ptr=block,
        enc_coef_ptr=block,
    )  # fmt: skip
    f.number(f.rows * block, "n")


def move_sum_groups(f: Far) -> None:
    f.number(ENTRIES, "offsets_ptr")
    f.shift(ENTRIES, coef_ptr=1)
    f.number(ROWS, "latents_ptr")
    f.shift(ROWS, out_ptr=1)
    f.by_program(offsets_ptr=1, latents_ptr=1)


MOVES: dict[str, Callable[[Far], None]] = {
    "spmm": move_spmm,
    "sddmm": move_sddmm,
    "decode_loss": move_decode_loss,
    "decode_loss_csr": move_decode_loss_csr,
    "tiles_pointer": move_tiles,
    "tiles_descriptor": move_tiles,
    "tiles_library": move_tiles,
    "merge_topk": move_merge_topk,
    "fill_csr": move_fill_csr,
    "count_from": move_count_from,
    "piece_sums": move_piece_sums,
    "mark_rows": move_mark_rows,
    "batch_sums": move_batch_sums,
    "fill_entries": move_fill_entries,
    "sum_groups": move_sum_groups,
    **dict.fromkeys(
        ("gradient_rows", "settle_rows", "row_update", "lean_settle_rows", "lean_row_update"),
        move_rows,
    ),
}
# What depends on row numbers otherwise: rounding by random bits of theirs, scratch that holds columns in keys, and what
# the first program alone writes.
OTHERWISE = {
    "lean_settle_rows": ("w_ptr",),
    "lean_row_update": ("w_ptr", "m_ptr"),
    "merge_topk": ("keys_ptr",),
    "count_from": ("found_ptr",),
}


def moved(kernel: str, given: dict[str, Any], grid: int) -> Far:
    far = Far(given, grid)
    MOVES[kernel](far)
    return far
