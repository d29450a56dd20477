"""What the SAEs of a command encode, and what transcoders map it to: hooks of a harvest, or keys of a file."""

from collections.abc import Collection, Sequence
from typing import Any

from saefast.data.source import TARGET, X
from saefast.errors import InputError
from saefast.harvest.hooks import expand_names


def targets(
    hooks: Collection[str | None], transcode: str | None, known: Sequence[str] = ()
) -> dict[str | None, str | None]:
    """The target of each hook, None where that is the hook itself.

    Args:
        transcode: the targets, comma-separated, in the hooks' order; a pattern means those of the known hooks that it
            matches, by the numbers of their blocks.

    Raises:
        InputError: there are not as many targets as hooks.
    """
    if transcode is None:
        return dict.fromkeys(hooks)
    names = transcode.split(",")
    found = expand_names(known, names) if known else tuple(names)
    if len(found) != len(hooks):
        raise InputError(
            f"--transcode {transcode}: {len(found)} targets for {len(hooks)} inputs; expected one for each, in the "
            "order of --hooks"
        )
    return dict(zip(hooks, found, strict=True))


def picked(hook: str | None, key: str | None, target: str | None) -> dict[str, Any]:
    """hook, hooks, key and keys, as `open_source` and `describe_data` take them.

    Raises:
        InputError: what is encoded is not named, or is the target too.
    """
    found: dict[str, Any] = {"hook": hook, "hooks": None, "key": key, "keys": None}
    if target is None:
        return found
    what, x = ("hook", hook) if key is None else ("key", key)
    if x is None:
        raise InputError(
            f"--transcode {target} names the target alone: say with --hook (of a file, --key) what to encode"
        )
    if x == target:
        raise InputError(f"--transcode {target} is what --{what} {x} encodes: an SAE reconstructs that; leave it out")
    return found | {what: None, f"{what}s": {X: x, TARGET: target}}
