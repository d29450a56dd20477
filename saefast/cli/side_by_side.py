"""What a crosscoder of a command line reads: several hooks of a harvest, or one of each of several models' harvests."""

from collections.abc import Mapping, Sequence
from typing import Any

from saefast.data.source import X
from saefast.errors import InputError
from saefast.harvest.hooks import expand_names

CROSSCODE, BESIDE = "crosscode", "beside"


def joined(crosscode: str, known: Sequence[str], n_folders: int) -> dict[str, list[str]]:
    """hooks, as `open_source` takes them.

    Args:
        crosscode: hooks, comma-separated; a pattern means those of the known ones that it matches.
        n_folders: of how many models; of several, each hook is one folder's, and one alone is that of all.

    Raises:
        InputError: there is one hook of one folder.
    """
    names = crosscode.split(",")
    found = expand_names(known, names) if known else tuple(names)
    if n_folders == 1 and len(found) < 2 and "*" not in found[0]:
        raise InputError(
            f"--crosscode {crosscode} names one hook: expected at least two, comma-separated, or the harvest of "
            "another model with --beside"
        )
    return {X: list(found)}


def check_joined(given: Mapping[str, Any]) -> None:
    """Raises InputError for flags, by name, None where they are not given, that do not go with the others."""
    crosscode, beside = given[CROSSCODE], given[BESIDE]
    if crosscode is None:
        if beside:
            raise InputError(f"--beside {beside[0]} is given without --crosscode: say which hooks lie side by side")
        return
    for name, value in given.items():
        if name not in (CROSSCODE, BESIDE) and value is not None:
            raise InputError(f"--crosscode and --{name} are given: --crosscode names all hooks; leave --{name} out")


def recorded(hooks: Mapping[str, str | list[str]] | None) -> str | None:
    """What --crosscode was when these hooks were trained on; None where it was not given."""
    names = (hooks or {}).get(X)
    return ",".join(names) if isinstance(names, list) and set(hooks or {}) == {X} else None
