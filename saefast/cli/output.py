"""Output in any encoding: signs that a terminal, pipe or file cannot take are written in ASCII."""

import codecs
import io
import sys
import unicodedata

# Formulas keep their meaning.
_ASCII = {
    "Σ": "sum ", "√": "sqrt ", "‖": "||", "−": "-", "–": "-", "—": "-", "·": "*", "×": "x", "²": "^2", "ⁿ": "^n",
    "ᵀ": "^T", "₂": "_2", "β": "beta", "≠": "!=", "≈": "~", "±": "+-", "≤": "<=", "≥": ">=", "←": "<-", "→": "->",
    "\N{COMBINING CIRCUMFLEX ACCENT}": "^", "\N{COMBINING MACRON}": "_mean", "…": "...",
    "─": "-", "━": "-", "│": "|", "╭": "+", "╮": "+", "╰": "+", "╯": "+",
}  # fmt: skip
_HANDLER = "saefast.ascii"


def take_any_text() -> None:
    """From now on all text can be printed to stdout and stderr, whichever encoding they have."""
    codecs.register_error(_HANDLER, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """As codecs.register_error wants it: what to write instead, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_sign, error.object[error.start : error.end])), error.end


def _sign(sign: str) -> str:
    """Its ASCII form, the letter without its accent, or its number."""
    if sign in _ASCII:
        return _ASCII[sign]
    letter = unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()
    return letter or sign.encode("ascii", "backslashreplace").decode()
