"""Loads the C++ extension saefast._native, on which the CPU backends stand.

Where it was not built (no compiler at install), torch does the same work, after one warning.
"""

import importlib
import warnings
from functools import cache
from types import ModuleType

from saefast.errors import InputError

# csrc/bindings.cpp has the same number: both are raised where the bindings change.
INTERFACE = 7


@cache
def load() -> ModuleType | None:
    """The C++ extension, or None where it was not built: then the first call, and only that one, warns.

    Raises:
        InputError: it was built from another version's sources, so that its functions take other arguments.
    """
    try:
        found = importlib.import_module("saefast._native")
    except ImportError as error:
        warnings.warn(
            f"saefast runs on torch alone: its C++ extension is missing ({error}). To build it, install a C++17 "
            "compiler (Debian: apt install g++) and run `pip install --force-reinstall --no-deps saefast`, "
            "or `pip install -e .` in a checkout.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    if getattr(found, "INTERFACE", 1) != INTERFACE:
        raise InputError(
            "saefast's C++ extension was built from another version of its sources: build it anew with "
            "`pip install --force-reinstall --no-deps saefast`, in a checkout `python setup.py build_ext --inplace`"
        )
    return found


def available() -> bool:
    """Whether the C++ extension is there (warns once where it is not)."""
    return load() is not None
