"""SAELens' training loop on saefast's step, and its training SAEs on saefast's ops: one import changes in a script.

    from saefast.integrations.sae_lens_training import SAETrainer    # was: from sae_lens import SAETrainer

has SAELens' loop take saefast's fused step. Where SAELens' Adam is to stay, as in its runners, it is the SAE's class:

    from saefast.integrations.sae_lens_training import TopKTrainingSAE, TopKTrainingSAEConfig

The first import of one of these registers the architectures "saefast_topk", "saefast_batchtopk" and
"saefast_matryoshka_batchtopk" with SAELens (6.54). What is saved is SAELens' own "topk", "batchtopk", ... and loads
where saefast is not installed. The classes are in sae_lens_classes.py.
"""

from typing import Any

from saefast.integrations.peer_classes import class_of


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return class_of("sae_lens_classes", name, "sae_lens", "sae-lens")
