"""How numbers read on the page: as saefast/latents/numbers.py says."""

from saefast.latents.numbers import FILTERS, SHADES, act, count, shade, share, signed

__all__ = ["FILTERS", "SHADES", "act", "count", "shade", "share", "signed"]
