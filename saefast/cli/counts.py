"""Counts as people write them: 131072, 128Ki, 2.5M, 1e6."""

import re
from decimal import Decimal

# k, M, G (or B) and T are thousands, for tokens and dictionaries alike. With an i they are powers of 1024, as IEC 80000
# has it: papers write 16k both for 16,384 latents and for 16,000 tokens, so neither can be guessed.
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
HELP = (
    "Counts: 128k is 128,000 and 2.5M is 2,500,000 (then G or B, and T); 128Ki is 131,072 and 16Mi is 16,777,216; "
    "1e6 and 1_000_000 work too."
)
# One more than the largest: what 64 bits hold.
LIMIT = 2**63
_WRITTEN = re.compile(r"([+-]?(?:[\d_]+(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?)\s*([kmgbt]?i?)", re.IGNORECASE)


def count(text: str) -> int:
    """The whole number that a text means. Raises ValueError, in words, for a text that means none."""
    found = _WRITTEN.fullmatch(text.strip())
    unit = UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None or not re.search(r"\d", found[1]):
        raise ValueError(f"{text!r} is no count such as 131072, 128Ki or 2.5M")
    value = Decimal(found[1]) * unit
    if abs(value) >= LIMIT:
        raise ValueError(f"{text!r} is beyond 2^63")
    if value != int(value):
        raise ValueError(f"{text!r} is {value.normalize():f}: expected a whole number")
    return int(value)


def meant(text: str) -> str | None:
    """What a written count was taken for, in words: "128k is 128,000 (128Ki is 131,072)"; None for plain digits."""
    if re.fullmatch(r"\s*[+-]?\d+\s*", text):
        return None
    written = text.strip()
    binary = f"{written[:-1]}{written[-1].upper()}i"
    other = f" ({binary} is {_whole(binary)})" if written[-1] in "kKmMgGtT" else ""
    return f"{written} is {count(text):,}{other}"


def _whole(text: str) -> str:
    try:
        return f"{count(text):,}"
    except ValueError:
        return "no whole number"
