"""Compiles the kernels for GPUs that are not here and reads the machine code; prints what it finds as JSON.

    python tests/aot.py [80 90 100 120]        # without TRITON_INTERPRET

Runs in a process of its own, because a process either interprets or compiles. Needs no driver: Triton's wheel carries
ptxas, cuobjdump and nvdisasm. What is compiled is what training and encoding launch, with every None, constant, dtype
and divisibility as the launcher would see it: `ptx.record` notes it, nothing is listed by hand.
"""

import collections
import dataclasses
import functools
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

import triton
from ptx.build import kernel_of
from ptx.call import Argument, Call, specialised
from ptx.record import distinct, encodings_launched, launched_kernels, steps_launched
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saefast.kernels import tuning

ARCHITECTURES = (80, 90, 100, 120)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LAUNCH = ("num_warps", "num_stages")
KINDS = {"bf16": "half", "fp16": "fp16", "fp32": "tf32"}


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
    least: int
    warps: int
    per_sm: int
    seconds: float


# Where every combination of Nones and constants is compiled; elsewhere each kernel and setting is.
WHOLE = 90
ENCODER = ("tiles_pointer", "tiles_descriptor", "tiles_library", "merge_topk")


def calls(arch: int) -> list[Call]:
    """What is compiled for an architecture. What a step launches beside the encoder has the same settings on all."""
    return distinct([*beside_the_encoder(arch == WHOLE), *encodings_launched(arch)])


@functools.cache
def beside_the_encoder(every: bool) -> list[Call]:
    return [call for call in steps_launched(every) if call.kernel not in ENCODER]


def name_of(call: Call, arch: int) -> str:
    """The kernel and what its form is."""
    a = call.arguments
    words = tile_words(call, arch) if call.kernel.startswith("tiles_") else plain_words(call)
    without = [n.removesuffix("_ptr") for n, x in a.items() if x.kind == "constant" and x.value is None]
    narrow = [n.removesuffix("_ptr") for n, x in a.items() if x.kind == "pointer" and not x.aligned]
    words += [f"without {','.join(without)}"] * bool(without) + [f"unaligned {','.join(narrow)}"] * bool(narrow)
    return " ".join([call.kernel, *words])


def tile_words(call: Call, arch: int) -> list[str]:
    a = call.arguments
    flags = [flag for flag, on in (
        ("latents", "latents_ptr" in a and a["latents_ptr"].kind == "pointer"),
        ("scale", a["scale_ptr"].kind == "pointer"),
        ("count", a["COUNT"].value),
    ) if on]  # fmt: skip
    if call.kernel == "tiles_library":
        return flags
    element = (a["x_desc"] if "x_desc" in a else a["x_ptr"]).type.partition("[")[0]
    kind = "ieee" if element == "fp32" and a["PRECISION"].value == "ieee" else KINDS[element]
    shape = *(a[n].value for n in ("BLOCK_B", "BLOCK_L", "BLOCK_D")), *(call.options[n] for n in LAUNCH)
    return [kind, str((*shape, per_sm(call, arch))), f"group={a['GROUP'].value}", *flags]


def per_sm(call: Call, arch: int) -> int:
    """Blocks on an SM that the setting of a persistent grid counts on."""
    a = call.arguments
    if "x_desc" not in a:
        return 0
    known = [s for (at, _), pair in tuning.TILES.items() if at == arch for s in pair] + list(tuning.LEAN_TILES.values())
    shape = tuple(a[n].value for n in ("BLOCK_B", "BLOCK_L", "BLOCK_D"))
    same = [
        s
        for s in known
        if (*s[:3], s.warps, s.stages) == (*shape, call.options["num_warps"], call.options["num_stages"])
    ]
    return max(s.per_sm for s in same)


def plain_words(call: Call) -> list[str]:
    """Types of the matrices, the width, and constants."""
    a = call.arguments
    types = [a[n].type for n in ("w_ptr", "W_ptr", "x_ptr") if n in a and a[n].kind == "pointer"]
    numbers = [f"{n}={a[n].value}" for n in ("D",) if n in a]
    constants = [f"{n}={x.value}" for n, x in a.items() if x.kind == "constant" and x.value is not None and n != "D"]
    return [*types, *numbers, *constants]


# By kernel: whose rows are gathered, and how many are on their way at once.
GATHERED = {
    "spmm": ("W_ptr", "UNROLL"),
    "sddmm": ("W_ptr", "BLOCK_K"),
    "decode_loss": ("W_ptr", "BLOCK_K"),
    "decode_loss_csr": ("W_ptr", "BLOCK_K"),
    "piece_sums": ("source_ptr", "UNROLL"),
    "gradient_rows": ("source_ptr", "UNROLL"),
    "row_update": ("source_ptr", "UNROLL"),
    "lean_row_update": ("source_ptr", "UNROLL"),
}


def least_wide_loads(call: Call) -> int:
    """128-bit loads of a thread if gathered rows are loaded 16 bytes at a time: what the code must have at least."""
    a = call.arguments
    matrix, rows = GATHERED.get(call.kernel, ("w_ptr", ""))
    if "D" not in a or matrix not in a or a["D"].value % 16:
        return 0
    count = a[rows].value if rows else 1
    width = {"fp32": 4, "bf16": 2, "fp16": 2}[a[matrix].type]
    return int(count * a["BLOCK_D"].value * width // (16 * 32 * call.options["num_warps"]))


def compile_call(call: Call, arch: int, name: str = "") -> Report:
    start = time.perf_counter()
    kernel = kernel_of(call)
    source = ASTSource(kernel, *specialised(kernel, call.arguments))
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=call.options)
    usage, opcodes, wide = inspect(compiled.asm["cubin"])
    spills = sum(count for opcode, count in opcodes.items() if opcode.split(".")[0] in ("STL", "LDL"))
    instructions = sum(opcodes.values()) - opcodes["FMNMX without NAN"]
    seconds = round(time.perf_counter() - start, 2)
    return Report(
        name or name_of(call, arch), arch, usage["REG"], usage["STACK"], spills, compiled.metadata.shared, instructions,
        opcodes, wide, least_wide_loads(call), call.options["num_warps"], per_sm(call, arch), seconds,
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


def broken_calls(good: list[Call]) -> Iterator[tuple[str, Call]]:
    """Compiled as they should not be, for the tests to see that they would notice."""
    sparse = next(call for call in good if call.kernel == "spmm" and call.arguments["D"].value >= 768)
    narrow = {n: dataclasses.replace(a, aligned=False) for n, a in sparse.arguments.items()}
    narrow["D"] = Argument("integer", value=770)
    yield "spmm unaligned", dataclasses.replace(sparse, arguments=narrow)
    merge = next(call for call in good if call.kernel == "merge_topk" and call.arguments["LOG"].value == 6)
    yield "merge_topk with 32 registers", dataclasses.replace(merge, options=merge.options | {"maxnreg": 32})


def integers_compiled_for() -> dict[str, list[str]]:
    """By kernel, the integers whose value (1, or a multiple of 16) the launcher compiles for."""
    return {
        name: [
            p.name
            for p in kernel.params
            if not (p.is_constexpr or p.do_not_specialize or p.name.endswith(("_ptr", "_desc")))
        ]
        for name, kernel in launched_kernels().items()
    }


def main(arguments: list[str]) -> None:
    architectures = [int(argument) for argument in arguments] or list(ARCHITECTURES)
    every = {arch: calls(arch) for arch in architectures}
    reports = [compile_call(call, arch) for arch in architectures for call in every[arch]]
    first = architectures[0]
    broken = [compile_call(call, first, name) for name, call in broken_calls(every[first])]
    found = {"reports": reports, "broken": broken, "specialised": integers_compiled_for()}
    json.dump(found, sys.stdout, default=dataclasses.asdict)


if __name__ == "__main__":
    main(sys.argv[1:])
