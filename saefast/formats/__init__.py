"""SAEs in the files of other libraries: one file for each format that is read and written, told by names and keys."""

from saefast.formats.format import Described, Format, Piece
from saefast.formats.opening import density, load, save
from saefast.formats.registry import formats
from saefast.formats.source import Entry, Source

__all__ = ["Described", "Entry", "Format", "Piece", "Source", "density", "formats", "load", "save"]
