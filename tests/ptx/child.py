"""Processes in which Triton compiles, beside those in which it interprets: one cannot do both."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def compiles() -> bool:
    """Whether this process does."""
    return os.environ.get("TRITON_INTERPRET", "0") == "0"


def environment(**variables: str) -> dict[str, str]:
    """This process's, for a child that compiles unless it says otherwise. tests/ and the checkout can be imported."""
    path = [str(ROOT / "tests"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(path)} | variables
