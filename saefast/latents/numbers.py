"""How numbers read on pages: filters of their templates. explorer/static/base.js says the same for scripts."""

import math

# Steps of shade, each a class of static/base.css: s0 is none, s20 the strongest.
SHADES = 20


def count(value: float) -> str:
    """12345 -> 12,345."""
    return f"{int(value):,}"


def act(value: float | None) -> str:
    """An activation, score, cosine or lift in three digits, more before the point where it has them."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size and (size < 0.001 or size >= 1e7):
        return f"{value:.1e}"
    places = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 or not size else 3
    return f"{value:,.{places}f}"


def share(value: float | None) -> str:
    """A share of 1 in percent: two digits, and no more places than say something. 0.00001 -> 0.0010 %."""
    if value is None or not math.isfinite(value):
        return "–"
    percent = 100 * value
    if percent == 0 or abs(percent) >= 99.95:
        return f"{percent:.0f} %"
    if abs(percent) < 0.0001:
        return f"{percent:.0e} %"
    places = 0 if abs(percent) >= 10 else 1 if abs(percent) >= 1 else 1 - math.floor(math.log10(abs(percent)))
    return f"{percent:.{places}f} %"


def signed(value: float) -> str:
    """As `act`, with a sign in front of either side."""
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{act(abs(value))}"


def shade(value: float, most: float) -> str:
    """Class of an activation's shade beside the largest: s1 to s20, s0 for nothing."""
    if not (value > 0 and most > 0):
        return "s0"
    return f"s{min(max(math.ceil(SHADES * value / most), 1), SHADES)}"


FILTERS = {"count": count, "act": act, "share": share, "signed": signed, "shade": shade}
