"""What an SAE over several layers or models reads: several hooks of a harvest, or one of each of several harvests."""

from collections.abc import Mapping, Sequence
from typing import Any

from saefast.data.source import TARGET, X
from saefast.errors import InputError
from saefast.harvest.hooks import expand_names

# Flags that name the hooks of several places at once.
JOINT = ("crosscode", "cross_layer")


def joined(given: Mapping[str, Any], known: Sequence[str] = ()) -> dict[str, list[str]]:
    """hooks, as `open_source` takes them.

    Args:
        given: the flags by name: crosscode, or cross_layer and transcode, hooks comma-separated, of which a pattern
            means those of the known ones that it matches; beside: further folders, one hook of each, or one of all.

    Raises:
        InputError: one hook of one folder; another number of inputs than of outputs.
    """
    found = {name: _named(given[name], known) for name in (*JOINT, "transcode") if given[name] is not None}
    if "crosscode" in found:
        names = found["crosscode"]
        if not given["beside"] and len(names) < 2 and "*" not in names[0]:
            raise InputError(
                f"--crosscode {names[0]} names one hook: expected at least two, comma-separated, or the harvest of "
                "another model with --beside"
            )
        return {X: names}
    inputs, outputs = found["cross_layer"], found["transcode"]
    patterns = any("*" in name for name in (*inputs, *outputs))
    if not patterns and (len(inputs) != len(outputs) or len(inputs) < 2):
        raise InputError(
            f"--cross-layer names {len(inputs)} inputs and --transcode {len(outputs)} outputs: expected as many of "
            "each, two or more, layer by layer"
        )
    return {X: inputs, TARGET: outputs}


def _named(hooks: str, known: Sequence[str]) -> list[str]:
    names = hooks.split(",")
    return list(expand_names(known, names) if known else names)


def check_joined(given: Mapping[str, Any]) -> None:
    """Raises InputError for flags, by name, None where they are not given, that do not go with the others."""
    asked = [name for name in JOINT if given[name] is not None]
    if given["beside"] and asked != ["crosscode"]:
        raise InputError(
            f"--beside {given['beside'][0]} is given without --crosscode: say which hooks lie side by side"
        )
    if not asked:
        return
    flag, allowed = asked[0], {asked[0], "beside"}
    if flag == "cross_layer":
        allowed.add("transcode")
        if given["transcode"] is None:
            raise InputError("--cross-layer names the inputs of layers: name their outputs with --transcode")
    for name, value in given.items():
        if name not in allowed and value:
            one, other = (text.replace("_", "-") for text in (flag, name))
            raise InputError(f"--{one} and --{other} are given: --{one} names all hooks; leave --{other} out")
    joined(given)


def recorded(hooks: Mapping[str, str | list[str]] | None) -> dict[str, Any] | None:
    """The flags with which these hooks were trained on; None where they were of one place."""
    lists = {tensor: ",".join(names) for tensor, names in (hooks or {}).items() if isinstance(names, list)}
    if X not in lists:
        return None
    return {"cross_layer": lists[X], "transcode": lists[TARGET]} if TARGET in lists else {"crosscode": lists[X]}
