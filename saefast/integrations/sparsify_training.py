"""sparsify's Trainer on saefast's step: one import changes in a script.

    from saefast.integrations.sparsify_training import Trainer    # was: from sparsify import Trainer

The loop, its hooks, schedules and checkpoints are sparsify's (1.3.3), and so are the SAEs' classes and parameters. The
class is in sparsify_classes.py.
"""

from typing import Any

from saefast.integrations.peer_classes import class_of


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return class_of("sparsify_classes", name, "sparsify", "eai-sparsify")
