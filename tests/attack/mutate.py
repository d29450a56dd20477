"""Damage to files: flipped bits, cuts, swapped blocks, odd values in JSON and in headers, and files that are no files.

Every function takes the bytes of a file and a random.Random, and returns other bytes. `damage` picks one.
"""

import json
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

# What a careless program, another version or a person with an editor leaves where a value was.
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "0", "../../x", "/", "\0", "\ud800", "a" * 5000, [], [[]], {}, [None], {"x": 1}, [1, 2, 3],
    [-1, -1], [2**62, 2**62], ["a"],
]  # fmt: skip
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "C64", "f32", "", "X"]
NUMBERS = [b"0", b"1", b"-1", b"9", b"65536", b"4294967296", b"9223372036854775807", b"-9223372036854775808", b"1e999"]
DEEP = 100_000


def flip_bit(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def set_byte(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]


def byte_run(data: bytes, rng: random.Random) -> bytes:
    start, stop = _range(data, rng)
    fill = rng.choice([b"\0", b"\xff", b" ", b"9", None])
    run = rng.randbytes(stop - start) if fill is None else fill * (stop - start)
    return data[:start] + run + data[stop:]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice([0, 1, 7, 8, 9, len(data) - 1, rng.randrange(len(data)), rng.randrange(len(data))])]


def extend(data: bytes, rng: random.Random) -> bytes:
    n = rng.choice([1, 8, 100, 4096])
    return data + rng.choice([bytes(n), rng.randbytes(n), data[:n], b"\n" * n])


def swap_blocks(data: bytes, rng: random.Random) -> bytes:
    a, b, c, d = sorted(rng.randrange(len(data) + 1) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def cut_out(data: bytes, rng: random.Random) -> bytes:
    start, stop = _range(data, rng)
    return data[:start] + data[stop:]


def double_block(data: bytes, rng: random.Random) -> bytes:
    start, stop = _range(data, rng)
    return data[:stop] + data[start:]


def odd_number(data: bytes, rng: random.Random) -> bytes:
    """Another number where digits stand in the first pages: the headers of .npy files, pickles, text."""
    found = list(re.finditer(rb"-?\d+", data[:65536]))
    if not found:
        return flip_bit(data, rng)
    at = rng.choice(found)
    return data[: at.start()] + rng.choice(NUMBERS) + data[at.end() :]


def json_value(data: bytes, rng: random.Random) -> bytes:
    """JSON with one value, key or list changed; deeply nested now and then; bytes flipped where it is no JSON."""
    try:
        value = json.loads(data)
    except ValueError:
        return flip_bit(data, rng)
    if rng.random() < 0.03:
        opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
        return (opening * DEEP + "1" + closing * rng.choice([DEEP, 0])).encode()
    return _dump(_changed(value, rng))


def json_line(data: bytes, rng: random.Random) -> bytes:
    """The same for one line of a .jsonl file; or lines swapped, doubled, left out."""
    lines = data.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind == 0:
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == 1:
        lines.insert(i, lines[j])
    elif kind == 2:
        del lines[i]
    else:
        lines[i] = json_value(lines[i], rng) if lines[i] else b"{}"
    return b"\n".join(lines)


def safetensors_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header: dtypes, shapes, offsets, names, metadata, nesting, or only its length."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        return flip_bit(data, rng)
    if rng.random() < 0.1:
        other = rng.choice([0, 1, length - 1, length + 1, len(data), 2**31, 2**63, 2**64 - 1])
        return struct.pack("<Q", other) + data[8:]
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError:
        return flip_bit(data, rng)
    text = b'{"a":' * DEEP + b"1" + b"}" * DEEP if rng.random() < 0.03 else _dump(_changed_header(header, rng))
    # Mostly the data stays where it was, so that only the header is wrong.
    text = text.ljust(length) if rng.random() < 0.8 else text
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _changed_header(header: dict[str, Any], rng: random.Random) -> Any:
    names = [name for name in header if name != "__metadata__"]
    if not names or rng.random() < 0.4:
        return _changed(header, rng)
    entry = header[rng.choice(names)]
    kind = rng.choice(["dtype", "shape", "data_offsets"])
    if kind == "dtype":
        entry[kind] = rng.choice(DTYPES)
    elif entry[kind] and rng.random() < 0.7:
        place = rng.randrange(len(entry[kind]))
        old = entry[kind][place]
        entry[kind][place] = rng.choice(
            [0, 1, -1, old + 1, old - 1, old * 2, -old, 2**31, 2**62, 2**63, 2**64, "1", 1.5]
        )
    else:
        entry[kind] = rng.choice([entry[kind][::-1], [*entry[kind], 1], entry[kind][:1], [1, *entry[kind]], [0, 0]])
    return header


def _changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one thing in it changed."""
    places = list(_places(value))
    if not places or rng.random() < 0.03:
        return rng.choice(ODD)
    owner, key = rng.choice(places)
    kind = rng.randrange(10)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        owner[rng.choice(["", "x", key + " ", key.upper(), "__tensor__"])] = owner.pop(key)
    elif kind == 2:
        other, place = rng.choice(places)
        owner[key], other[place] = other[place], owner[key]
    elif kind == 3 and isinstance(owner, list):
        owner.insert(key, owner[key])
    elif kind in (4, 5, 6):
        owner[key] = _near(owner[key], rng)
    else:
        owner[key] = rng.choice(ODD)
    return value


def _near(value: Any, rng: random.Random) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, -value, value * 10, value // 2, value ^ 1 << rng.randrange(20)])
    if isinstance(value, float):
        return rng.choice([value * 1.001, -value, value + 1, value * 1e30, 0.0])
    if isinstance(value, str) and value:
        place = rng.randrange(len(value))
        return value[:place] + rng.choice("0a/x \u00e9") + value[place + 1 :]
    return value[::-1] if isinstance(value, list) else {}


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    found, todo = [], [value]
    while todo:
        owner = todo.pop()
        keys = list(owner) if isinstance(owner, dict) else range(len(owner)) if isinstance(owner, list) else []
        for key in keys:
            found.append((owner, key))
            todo.append(owner[key])
    return found


def _dump(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except ValueError:  # a list that was swapped into itself
        return b"[]"


def _range(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(start + rng.choice([1, 2, 8, 64, 1000, len(data)]), len(data))


GENERIC: list[Mutation] = [
    flip_bit, flip_bit, flip_bit, set_byte, byte_run, truncate, truncate, extend, swap_blocks, cut_out, double_block,
    odd_number,
]  # fmt: skip
AWARE: dict[str, Mutation] = {
    ".json": json_value,
    ".meta": json_value,
    ".jsonl": json_line,
    ".safetensors": safetensors_header,
    ".npy": odd_number,
}
# What stands where a file should be. A pipe that nobody writes to makes a careless reader wait for ever.
NO_FILE = ["missing", "folder", "loop", "pipe", "empty"]


def damage(name: str, data: bytes, rng: random.Random) -> tuple[str, bytes | None]:
    """(the damage's name, other bytes) for a file `name` of these bytes; None instead of bytes is a NO_FILE."""
    if rng.random() < 0.03:
        return rng.choice(NO_FILE), None
    aware = AWARE.get(Path(name).suffix)
    for _ in range(100):
        mutation = aware if aware and rng.random() < 0.5 else rng.choice(GENERIC)
        other = mutation(data, rng) if data else b"x"
        if other != data:
            return mutation.__name__, other
    return "extend", data + b"x"
