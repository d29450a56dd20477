"""Compiles the kernels for GPUs that are not here and reads the machine code; prints what it finds as JSON.

    python tests/aot.py [80 90 100 120]        # without TRITON_INTERPRET

Runs in a process of its own, because a process either interprets or compiles. Needs no driver: Triton's wheel carries
ptxas, cuobjdump and nvdisasm. Types and divisibilities are those the launcher would derive from the tensors that
`saefast.triton_ops` passes; without them the compiler would emit scalar loads and the numbers would mean nothing.
"""

import collections
import dataclasses
import hashlib
import inspect as python
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saefast import rows_triton
from saefast.kernels import (
    decode_loss,
    encode_tiles,
    fill_csr,
    fill_entries,
    merge_topk,
    moments,
    row_update,
    sddmm,
    spmm,
    tuning,
)  # fmt: skip
from saefast.optim import LEAN_BLOCK

ARCHITECTURES = (80, 90, 100, 120)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ELEMENTS = {"half": "bf16", "fp16": "fp16", "tf32": "fp32", "ieee": "fp32"}
# Integers a launch passes that are multiples of 16 whenever the model's width is.
DIVISIBLE = ("D", "stride")


@dataclasses.dataclass
class Case:
    """One compilation: a kernel, its argument types, what is fixed at compile time, and launch options."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int | None = None
    per_sm: int = 0
    aligned: bool = True
    fusion: bool = True


@dataclasses.dataclass
class Report:
    name: str
    arch: int
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: int
    opcodes: dict[str, int]
    wide_loads: int
    warps: int
    per_sm: int
    seconds: float


def cases(arch: int) -> Iterator[Case]:
    """Every kernel and every checked-in setting for an architecture."""
    yield from tile_cases(arch)
    yield from merge_cases()
    yield from sparse_cases()
    yield from decode_cases()
    yield from batch_cases()
    yield from row_cases()
    yield from lean_cases()


def tile_cases(arch: int) -> Iterator[Case]:
    for kind in ("half", "tf32", "ieee"):
        for config in dict.fromkeys(tuning.TILES[arch, kind]):
            yield tile_case(kind, config, 32)
        pointer = tuning.pointer_tiles(arch, kind, 768)
        if kind != "ieee":
            yield tile_case(kind, pointer, 32, latents=True)
    narrow, wide = tuning.TILES[arch, "half"]
    yield tile_case("fp16", narrow, 32)
    yield tile_case("half", wide, 64)
    lean = tuning.tiles(arch, "half", 4096, plain=False)
    yield tile_case("half", lean, 32, scale=True)
    yield tile_case("half", lean, 32, count=True)
    for count in (False, True):
        types = vectors(count, False) | dict.fromkeys(("B", "n", "start", "stride", "threshold_step", "span"), "i32")
        constants = {"BLOCK_B": 64, "BLOCK_L": 128, "GROUP": 32, "COUNT": count, "scale_ptr": None}
        yield Case(f"tiles_library count={count}", encode_tiles.tiles_library, types, constants, 4, 3)


def tile_case(
    kind: str, config: tuning.Tiles, group: int, *, latents: bool = False, scale: bool = False, count: bool = False
) -> Case:
    element = ELEMENTS[kind]
    types = vectors(count, scale)
    constants: dict[str, Any] = {"GROUP": group, "COUNT": count, "PRECISION": "tf32" if kind == "tf32" else "ieee"}
    constants |= {"BLOCK_B": config.block_b, "BLOCK_L": config.block_l, "BLOCK_D": config.block_d}
    described = config.per_sm > 0 and not latents
    if described:
        types["x_desc"] = f"tensordesc<{element}[{config.block_b}, {config.block_d}]>"
        types["W_desc"] = f"tensordesc<{element}[{config.block_l}, {config.block_d}]>"
    else:
        types |= {"x_ptr": f"*{element}", "W_ptr": f"*{element}"}
        types |= {"latents_ptr": "*i32"} if latents else {}
    types |= dict.fromkeys(("B", "n", "start", "D", "stride", "threshold_step", "span"), "i32")
    kernel = encode_tiles.tiles_descriptor if described else encode_tiles.tiles_pointer
    extra = f"{' latents' * latents}{' scale' * scale}{' count' * count}"
    name = f"{'tiles_descriptor' if described else 'tiles_pointer'} {kind} {tuple(config)} group={group}{extra}"
    return Case(name, kernel, types, constants, config.warps, config.stages, per_sm=config.per_sm * described)


def vectors(count: bool, scale: bool) -> dict[str, str]:
    types = dict.fromkeys(("bias_ptr", "threshold_ptr", "scratch_ptr"), "*fp32")
    return types | {"groups_ptr": "*i32" if count else "*fp32"} | ({"scale_ptr": "*fp32"} if scale else {})


def merge_cases() -> Iterator[Case]:
    types = dict.fromkeys(("groups_ptr", "scratch_ptr", "acts_ptr", "tau_ptr"), "*fp32")
    types |= {"list_ptr": "*i32", "idx_ptr": "*i32", "keys_ptr": "*i64"}
    types |= dict.fromkeys(("n", "start", "K", "stride"), "i32")
    # (run, group, first chunk, groups its bound sorts, scaled)
    for run, group, first, bound, scaled in (
        (32, 32, True, 128, False),
        (64, 64, False, 0, True),
        (128, 32, False, 0, False),
        (512, 64, False, 0, False),
        (2048, 64, True, 4096, False),
    ):
        config = tuning.merge(run, group)
        constants = {"FIRST": first, "BOUND": bound, "LOG": run.bit_length() - 1, "GROUP": group}
        constants |= {"BLOCK_G": config.block_g, "VISIT": config.visit}
        extra = {"scale_ptr": "*fp32"} if scaled else {}
        name = f"merge_topk run={run} group={group} bound={bound}{' scale' * scaled}"
        yield Case(name, merge_topk.merge_topk, types | extra, constants, config.warps, 1, config.registers)


def sparse_cases() -> Iterator[Case]:
    for element, out, D in (("bf16", "bf16", 4096), ("bf16", "bf16", 768), ("fp32", "fp32", 4096)):
        config = tuning.spmm(D)
        types = {"acts_ptr": "*fp32", "idx_ptr": "*i32", "W_ptr": f"*{element}", "out_ptr": f"*{out}"}
        types |= {"D": "i32", "K": "i32"}
        sizes = {"BLOCK_D": config.block_d, "UNROLL": config.unroll}
        yield Case(f"spmm {element} D={D}", spmm.spmm, types, sizes, config.warps, 1)
        dots = tuning.sddmm(D, 64)
        types = {"x_ptr": f"*{element}", "idx_ptr": "*i32", "W_ptr": f"*{element}", "out_ptr": "*fp32"}
        types |= {"D": "i32", "K": "i32"}
        sizes = {"BLOCK_K": dots.block_k, "BLOCK_D": dots.block_d}
        yield Case(f"sddmm {element} D={D}", sddmm.sddmm, types, sizes, dots.warps, 1)
    config = tuning.spmm(4096)
    types = {"acts_ptr": "*fp32", "idx_ptr": "*i64", "row_ptr": "*i64", "W_ptr": "*bf16", "out_ptr": "*fp32"}
    types |= {"D": "i32", "K": "i32"}
    yield Case("spmm rows bf16 D=4096", spmm.spmm, types, {"BLOCK_D": config.block_d, "UNROLL": config.unroll}, 4, 1)
    types = dict.fromkeys(("scratch_ptr", "threshold_ptr", "acts_ptr"), "*fp32")
    types |= {"counts_ptr": "*i32", "ends_ptr": "*i64", "idx_ptr": "*i32"}
    types |= dict.fromkeys(("n", "start", "stride", "threshold_step"), "i32")
    yield Case("fill_csr", fill_csr.fill_csr, types, {"GROUP": 32, "VISIT": 64}, 4, 3)


def decode_cases() -> Iterator[Case]:
    floats = ("x_ptr", "acts_ptr", "b_ptr", "weight_ptr", "residual_ptr", "squares_ptr", "grad_ptr")
    for element, D, k, planes, extra in (
        ("fp32", 768, 32, 1, {}),
        ("bf16", 4096, 64, 1, {"error_ptr": "*fp32"}),
        ("fp32", 768, 128, 2, {"error_ptr": "*fp32"}),
        ("fp32", 4096, 512, 1, {}),
        ("fp32", 4096, 2048, 1, {}),
        ("bf16", 4096, 2048, 1, {}),
        ("fp32", 8192, 4096, 1, {}),
        ("fp32", 768, 64, 4, {}),
    ):
        config = tuning.decode_loss(D, k, planes)
        types = dict.fromkeys(floats, "*fp32") | {"idx_ptr": "*i32", "bounds_ptr": "*i32", "W_ptr": f"*{element}"}
        types |= extra | dict.fromkeys(("B", "D", "K"), "i32")
        constants = {"P": planes, "BY_LATENT": planes > 1, "RELU": True, "BLOCK_P": planes}
        constants |= {"BLOCK_K": config.block_k, "BLOCK_D": config.block_d}
        name = f"decode_loss {element} D={D} k={k} planes={planes}"
        yield Case(name, decode_loss.decode_loss, types, constants, config.warps, 1, fusion=rows_triton.FUSION)


# Where a row's debts for the steps it slept are looked up.
OWED = {"last_ptr": "*i32", "drift_ptr": "*fp64", "drift_eps_ptr": "*fp64"}
OWED |= {"until": "i32", "log1": "fp32", "log2": "fp32"}


def row_cases() -> Iterator[Case]:
    gradient = {"source_ptr": "*fp32", "offsets_ptr": "*i32", "row_ptr": "*i32", "coef_ptr": "*fp32"}
    cut = {"pieces_ptr": "*fp32", "first_ptr": "*i32"}
    matrix = dict.fromkeys(("w_ptr", "m_ptr", "v_ptr"), "*fp32") | {"rows_ptr": "*i32", "D": "i32"}
    copies = {"shadow_ptr": "*bf16", "norms_ptr": "*fp32"}
    numbers = ("grad_scale", "lerp1", "beta2", "lerp2", "rate", "root2", "eps")
    updates = gradient | cut | matrix | OWED | dict.fromkeys(numbers, "fp32") | {"squares_ptr": "*fp32"}
    squares = gradient | cut | {"w_ptr": "*fp32", "rows_ptr": "*i32", "squares_ptr": "*fp32", "D": "i32"}
    pieces = gradient | {"first_ptr": "*i32", "run_ptr": "*i32", "out_ptr": "*fp32", "n": "i32", "D": "i32"}
    for D, whole in ((768, True), (4096, False), (2304, True), (tuning.MAX_ROW, True)):
        config = tuning.rows(D, whole)
        options, settled = (config.warps, 1, tuning.ROW_REGISTERS), {"BLOCK_D": config.block_d}
        summed = settled | {"UNROLL": config.unroll}
        kind, extra = f"D={D} whole={whole}", copies if whole else {"shadow_ptr": "*bf16"}
        how = {"PROJECT": whole, "NORM": 2 * whole}
        yield Case(f"row_update {kind}", row_update.row_update, updates | extra, summed | how, *options)
        how = {"PROJECT": whole}
        yield Case(f"gradient_squares {kind}", row_update.gradient_squares, squares, summed | how, *options)
        types, how = matrix | extra | OWED, {"NORM": 2 * whole}
        yield Case(f"settle_rows {kind}", row_update.settle_rows, types, settled | how, *options)
        # No run was cut: no pieces, so nothing of what reads them.
        short = {name: kind for name, kind in updates.items() if name not in cut}
        how = {"PROJECT": whole, "NORM": 2 * whole}
        yield Case(f"row_update {kind} uncut", row_update.row_update, short | extra, summed | how, *options)
        short = {name: kind for name, kind in squares.items() if name not in cut}
        how = {"PROJECT": whole}
        yield Case(f"gradient_squares {kind} uncut", row_update.gradient_squares, short, summed | how, *options)
        if not whole:
            yield Case(f"piece_sums {kind}", row_update.piece_sums, pieces, summed | {"CUT": tuning.CUT}, *options)
            types = gradient | cut | {"out_ptr": "*fp32", "D": "i32"}
            yield Case(f"gradient_rows {kind}", row_update.gradient_rows, types, summed, *options)
    types = {"rows_ptr": "*i32", "last_ptr": "*i32", "n": "i32", "step": "i32"}
    yield Case("mark_rows", row_update.mark_rows, types, {"BLOCK": tuning.ENTRIES}, 4, 1)


def batch_cases() -> Iterator[Case]:
    for D in (768, 4096):
        config = tuning.moments(D)
        types = {"x_ptr": "*fp32", "origin_ptr": "*fp32", "B": "i32", "D": "i32"}
        types |= dict.fromkeys(("shifted_ptr", "spread_ptr", "squares_ptr"), "*fp64")
        sizes = {"ROWS": config.rows, "UNROLL": config.unroll, "BLOCK_D": config.block_d}
        yield Case(f"moments D={D}", moments.moments, types, sizes, config.warps, 1)
    types = dict.fromkeys(("acts_ptr", "grad_ptr", "dec_coef_ptr", "enc_coef_ptr"), "*fp32")
    types |= dict.fromkeys(("order_ptr", "bounds_ptr", "dec_row_ptr", "enc_row_ptr"), "*i32")
    types |= dict.fromkeys(("n", "n_tokens", "K", "K_more"), "i32")
    yield Case("fill_entries", fill_entries.fill_entries, types, {"P": 2, "BLOCK": tuning.ENTRIES}, 4, 1)
    types = {"coef_ptr": "*fp32", "offsets_ptr": "*i32", "latents_ptr": "*i32", "out_ptr": "*fp32"}
    yield Case("sum_runs", fill_entries.sum_runs, types, {"BLOCK": tuning.RUN}, 1, 1)


def lean_cases() -> Iterator[Case]:
    types = {"source_ptr": "*fp32", "offsets_ptr": "*i32", "row_ptr": "*i32", "coef_ptr": "*fp32"}
    types |= {"pieces_ptr": "*fp32", "first_ptr": "*i32", "squares_ptr": "*fp32"}
    matrix = {"w_ptr": "*bf16", "m_ptr": "*i8", "scale_ptr": "*bf16", "v_ptr": "*fp32", "norms_ptr": "*fp32"}
    matrix |= OWED | {"rows_ptr": "*i32"} | dict.fromkeys(("D", "when"), "i32")
    numbers = ("grad_scale", "lerp1", "beta2", "lerp2", "rate", "root2", "eps")
    for D in (768, 4096, tuning.MAX_ROW):
        config, blocks = tuning.rows(D, True), -(-D // LEAN_BLOCK)
        options = (config.warps, 1, tuning.ROW_REGISTERS)
        how = {"NORM": 2, "WIDTH": -(-D // blocks), "BLOCKS": blocks, "BLOCK_D": config.block_d}
        room = {"ROOM": triton.next_power_of_2(blocks)}
        yield Case(f"lean_settle_rows D={D}", row_update.lean_settle_rows, matrix, how | room, *options)
        # W_enc's sweep: no norms, so no sum over the row whose barriers would come for nothing.
        plain = {name: kind for name, kind in matrix.items() if name != "norms_ptr"}
        sweep = how | room | {"NORM": 0}
        yield Case(f"lean_settle_rows D={D} sweep", row_update.lean_settle_rows, plain, sweep, *options)
        updates = types | matrix | dict.fromkeys(numbers, "fp32")
        summed = how | {"PROJECT": True, "UNROLL": config.unroll}
        yield Case(f"lean_row_update D={D}", row_update.lean_row_update, updates, summed, *options)
        short = {name: kind for name, kind in updates.items() if name not in ("pieces_ptr", "first_ptr")}
        yield Case(f"lean_row_update D={D} uncut", row_update.lean_row_update, short, summed, *options)


def compile_case(case: Case, arch: int) -> Report:
    start = time.perf_counter()
    names = case.kernel.arg_names
    constants = case.constants | {name: None for name in names if name not in case.types | case.constants}
    signature = {name: "constexpr" if name in constants else case.types[name] for name in names}
    divisible = [name for name in names if signature[name].startswith("*") or name in DIVISIBLE]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible if case.aligned}
    options = {"num_warps": case.warps, "num_stages": case.stages, "maxnreg": case.registers}
    options["enable_fp_fusion"] = case.fusion
    source = ASTSource(case.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, opcodes, wide = inspect(compiled.asm["cubin"])
    spills = sum(count for name, count in opcodes.items() if name.split(".")[0] in ("STL", "LDL"))
    instructions = sum(opcodes.values()) - opcodes["FMNMX without NAN"]
    seconds = round(time.perf_counter() - start, 2)
    return Report(
        case.name, arch, usage["REG"], usage["STACK"], spills, compiled.metadata.shared, instructions,
        opcodes, wide, case.warps, case.per_sm, seconds,
    )  # fmt: skip


def inspect(cubin: bytes) -> tuple[dict[str, int], dict[str, int], int]:
    """Registers and stack, instructions by opcode, and 128-bit global loads of a cubin; cached by its hash."""
    folder = Path(tempfile.gettempdir()) / "saefast-aot"
    folder.mkdir(exist_ok=True)
    # What is read out of a cubin is decided by these functions, so their text is part of the key.
    text = "".join(map(python.getsource, (usage_of, opcodes_of)))
    cached = folder / f"{hashlib.sha256(cubin + text.encode()).hexdigest()}.json"
    if not cached.exists():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            found = usage_of(file.name), *opcodes_of(file.name)
        partial = cached.with_suffix(f".{time.monotonic_ns()}")
        partial.write_text(json.dumps(found))
        partial.replace(cached)
    usage, opcodes, wide = json.loads(cached.read_text())
    return usage, opcodes, wide


def usage_of(path: str) -> dict[str, int]:
    text = run_tool("cuobjdump", "--dump-resource-usage", path)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def opcodes_of(path: str) -> tuple[dict[str, int], int]:
    text = run_tool("cuobjdump", "-sass", path)
    found = re.findall(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", text)
    wide = sum(name.startswith("LDG") and ".128" in name for name in found)
    opcodes = collections.Counter(name.split(".")[0] for name in found)
    # Maxima that drop a NaN, by their own name.
    opcodes["FMNMX without NAN"] = sum(name.startswith("FMNMX") and ".NAN" not in name for name in found)
    return dict(opcodes), wide


def run_tool(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], check=True, capture_output=True, text=True).stdout


def broken_cases() -> Iterator[Case]:
    """Compiled as they should not be, for the tests to see that they would notice."""
    sparse = next(case for case in sparse_cases() if case.name.startswith("spmm"))
    yield dataclasses.replace(sparse, name="spmm unaligned", aligned=False)
    merge = next(case for case in merge_cases() if "run=64" in case.name)
    yield dataclasses.replace(merge, name="merge_topk with 32 registers", registers=32)


def specialised() -> dict[str, list[str]]:
    """By kernel, the integers whose value (1, or a multiple of 16) the launcher compiles for."""
    kernels = (
        encode_tiles.tiles_pointer, encode_tiles.tiles_descriptor, encode_tiles.tiles_library, merge_topk.merge_topk,
        fill_csr.fill_csr, spmm.spmm, sddmm.sddmm, decode_loss.decode_loss, moments.moments, fill_entries.fill_entries,
        fill_entries.sum_runs, row_update.mark_rows, row_update.piece_sums, row_update.gradient_rows,
        row_update.gradient_squares, row_update.settle_rows, row_update.row_update, row_update.lean_settle_rows,
        row_update.lean_row_update,
    )  # fmt: skip
    return {
        kernel.fn.__name__: [
            p.name
            for p in kernel.params
            if not (p.is_constexpr or p.do_not_specialize or p.name.endswith(("_ptr", "_desc")))
        ]
        for kernel in kernels
    }


def main(arguments: list[str]) -> None:
    architectures = [int(argument) for argument in arguments] or list(ARCHITECTURES)
    reports = [compile_case(case, arch) for arch in architectures for case in cases(arch)]
    broken = [compile_case(case, architectures[0]) for case in broken_cases()]
    found = {"reports": reports, "broken": broken, "specialised": specialised()}
    json.dump(found, sys.stdout, default=dataclasses.asdict)


if __name__ == "__main__":
    main(sys.argv[1:])
