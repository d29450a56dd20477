"""Classes made from another library's: the library is imported when one of them is first asked for."""

import importlib
from typing import Any

from saefast.errors import InputError


def class_of(file: str, name: str, package: str, distribution: str) -> Any:
    """A name in the file of this room that imports `package`.

    Raises:
        InputError: the package is not installed. AttributeError: the file has no such name.
    """
    try:
        module = importlib.import_module(f"saefast.integrations.{file}")
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != package:
            raise
        raise InputError(
            f"{name} is for the training loop of {package}, which is not installed: pip install {distribution}"
        ) from error
    return getattr(module, name)
