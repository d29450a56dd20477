"""The model and tokenizer of a harvest, found again by name or as they are given: those that it is of and no others."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saefast.errors import InputError
from saefast.harvest import language_models as models
from saefast.harvest.identity import identity_of, why_other


class OtherModel(InputError):
    """The model or tokenizer is not the one that was harvested."""


def harvested_model(
    index: Mapping[str, Any], given: Any = None, *, head: str = "AutoModel", device: torch.device | str = "cpu"
) -> Any:
    """The model whose activations a harvest holds, in the dtype that it ran in.

    Args:
        index: the harvest's index.json. Where it keeps no digest, as before there were any, a warning says so.
        given: the model, or a folder or name that it loads from; None is the name in the index.
        head, device: for one that is loaded, as in load_model.

    Raises:
        OtherModel: its weights are not those that were harvested.
        InputError: it does not load.
    """
    model, revision = given, None
    if given is None:
        model, revision = str(index.get("model", "")), index.get("revision")
    if isinstance(model, str | Path):
        dtype = getattr(torch, str(index.get("forward") or "float32"))
        model = models.load_model(model, revision=revision, dtype=dtype, device=device, head=head)
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}: expected a model of transformers, a folder or a name")
    _check(index, given, "model", model=model)
    if (index.get("identity") or {}).get("weights") is None:
        warnings.warn(
            f"whether {_called(index, given)} is the model that was harvested is not known: the harvest keeps no "
            "digest of its weights",
            RuntimeWarning,
            stacklevel=2,
        )
    return model


def causal_language_model(index: Mapping[str, Any], given: Any = None, device: torch.device | str = "cpu") -> Any:
    """As `harvested_model`, with its language-model head. Raises InputError too where it has none."""
    place = str(index.get("model", "")) if given is None else given
    if isinstance(place, str | Path):
        revision = index.get("revision") if given is None else None
        kinds = [models.architecture(place, revision=revision)]
    else:
        # What torch.compile gives has the model inside.
        kinds = [kind.__name__ for kind in type(getattr(given, "_orig_mod", given)).__mro__]
    if kinds[0].endswith("ForConditionalGeneration"):
        raise InputError(
            f"{_called(index, given)} is a {kinds[0]}, which writes after another text, or images or sound: "
            "there is no next-token loss of a text alone"
        )
    if not any(kind.endswith(models.CAUSAL) for kind in kinds):
        raise InputError(f"{_called(index, given)} is a {kinds[0]}, which has no language-model head")
    return harvested_model(index, given, head="AutoModelForCausalLM", device=device)


def harvested_tokenizer(index: Mapping[str, Any], given: Any = None, model: Any = None) -> Any:
    """The tokenizer that made a harvest's token ids.

    Args:
        index: the harvest's index.json.
        given: the tokenizer, or a folder or name that it loads from; None is that of `model`, as in harvested_model.

    Raises:
        OtherModel: it makes other ids of text than the one that was used.
        InputError: it does not load.
    """
    tokenizer = given if given is not None else getattr(model, "tokenizer", None)
    if tokenizer is None:
        tokenizer = model if isinstance(model, str | Path) else str(index.get("model", ""))
    if isinstance(tokenizer, str | Path):
        named = given is None and model is None
        tokenizer = models.load_tokenizer(tokenizer, revision=index.get("revision") if named else None)
    _check(index, given if given is not None else model, "tokenizer", tokenizer=tokenizer)
    return tokenizer


def check_given(index: Mapping[str, Any], model: Any, tokenizer: Any) -> None:
    """Raises OtherModel for a model or tokenizer given as an object that is not the harvest's; none is loaded."""
    for what, given in (("model", model), ("tokenizer", tokenizer)):
        if given is not None and not isinstance(given, str | Path):
            _check(index, given, what, **{what: given})


def _check(index: Mapping[str, Any], given: Any, what: str, *, model: Any = None, tokenizer: Any = None) -> None:
    kept = index.get("identity") or {}
    if why := why_other(kept, identity_of(model, tokenizer)):
        # An argument that was given is wrong; a name may lead to another model than it did.
        advice = "" if given is not None else f"; give the one that was harvested, as {what}= or --model"
        raise OtherModel(f"{_called(index, given)} is not the {what} that was harvested: {why}{advice}")


def _called(index: Mapping[str, Any], given: Any) -> str:
    if given is None:
        return str(index.get("model", ""))
    return str(given) if isinstance(given, str | Path) else f"the given {type(given).__name__}"
