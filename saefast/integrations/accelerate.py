"""accelerate, restore: a live SAE, or trainer, of SAELens, sparsify or dictionary_learning on saefast's ops.

The object keeps its class, its Parameter objects (an optimiser's references hold), its state dict, hooks, `.to()`,
copying and pickling; methods are replaced on the instance alone. Where hooks want a dense (B, L) tensor of the
pre-activations, the peer's own code runs.
"""

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import nn
from torch.optim import Adam, Optimizer

from saefast.errors import InputError
from saefast.integrations import accelerate_dictionary_learning as of_dictionary_learning
from saefast.integrations import accelerate_sae_lens as of_sae_lens
from saefast.integrations import accelerate_sparsify as of_sparsify
from saefast.integrations.accelerate_gradients import release
from saefast.integrations.accelerate_optimizer import fuse, guard, unfuse
from saefast.integrations.accelerate_state import NAME, State, contiguous_state, latents, put_back, state_of

T = TypeVar("T")
Methods = dict[str, Callable[..., Any]]


class Kind(NamedTuple):
    """How objects of one class are accelerated."""

    methods: Methods
    """Of the object, by name: what stands in their places."""
    columns: tuple[str, ...] = ()
    """Parameters (width, n_latents)."""
    rows: tuple[str, ...] = ()
    """Parameters (n_latents, width) that are not always contiguous."""
    stands_for: tuple[str, ...] = ()
    """Methods that the replaced ones no longer call: a subclass that has its own is not the class that is known."""
    inside: str | None = None
    """The attribute that holds the SAE, where the object is a trainer."""


class Package(NamedTuple):
    distribution: str
    versions: tuple[str, ...]
    """Beginnings of version numbers whose code was read and is tested against."""
    kinds: dict[str, Kind]
    """By class name."""


def _sae(**methods: Callable[..., Any]) -> Kind:
    """One of SAELens' SAEs."""
    served: Methods = {"encode": of_sae_lens.encode, "decode": of_sae_lens.decode, "forward": of_sae_lens.forward}
    stands_for = ("encode_with_hidden_pre", "calculate_aux_loss", "calculate_topk_aux_loss")
    return Kind(served | methods, columns=("W_enc",), stands_for=stands_for if methods else ())


def _dictionary(columns: str, *rows: str) -> Kind:
    """One of dictionary_learning's dictionaries."""
    ours = of_dictionary_learning
    return Kind({"encode": ours.encode, "decode": ours.decode, "forward": ours.forward}, (columns,), rows)


def _trainer(loss: Callable[..., Any]) -> Kind:
    """One of dictionary_learning's trainers."""
    return Kind({"loss": loss}, stands_for=("get_auxiliary_loss",), inside="ae")


_SPARSIFY = {
    "SparseCoder": Kind(
        {
            "encode": of_sparsify.encode,
            "decode": of_sparsify.decode_topk,
            "forward": of_sparsify.forward,
            "remove_gradient_parallel_to_decoder_directions": of_sparsify.remove_parallel_gradient,
        }
    )
}
_SAE_LENS = {
    "TopKSAE": _sae(),
    "JumpReLUSAE": _sae(),
    "StandardSAE": _sae(),
    "Transcoder": _sae(),
    "SkipTranscoder": _sae(),
    "JumpReLUTranscoder": _sae(),
    "JumpReLUSkipTranscoder": _sae(),
    "TopKTrainingSAE": _sae(training_forward_pass=of_sae_lens.topk_training_forward_pass),
    "BatchTopKTrainingSAE": _sae(training_forward_pass=of_sae_lens.topk_training_forward_pass),
    "MatryoshkaBatchTopKTrainingSAE": _sae(training_forward_pass=of_sae_lens.topk_training_forward_pass),
    "JumpReLUTrainingSAE": _sae(training_forward_pass=of_sae_lens.jumprelu_training_forward_pass),
    "StandardTrainingSAE": _sae(training_forward_pass=of_sae_lens.standard_training_forward_pass),
    "SAETrainer": Kind({}, inside="sae"),
}
_DICTIONARY_LEARNING = {
    "AutoEncoderTopK": _dictionary("decoder.weight", "encoder.weight"),
    "BatchTopKSAE": _dictionary("decoder.weight", "encoder.weight"),
    "MatryoshkaBatchTopKSAE": _dictionary("W_enc"),
    "JumpReluAutoEncoder": _dictionary("W_enc"),
    "TopKTrainer": _trainer(of_dictionary_learning.topk_loss),
    "BatchTopKTrainer": _trainer(of_dictionary_learning.batch_topk_loss),
    "MatryoshkaBatchTopKTrainer": _trainer(of_dictionary_learning.matryoshka_loss),
    "JumpReluTrainer": _trainer(of_dictionary_learning.jumprelu_loss),
}
PACKAGES = {
    "sae_lens": Package("sae-lens", ("6.54.",), _SAE_LENS),
    "sparsify": Package("eai-sparsify", ("1.3.3",), _SPARSIFY),
    "dictionary_learning": Package("dictionary-learning", ("0.1.0",), _DICTIONARY_LEARNING),
}


def accelerate(
    sae: T,
    optimizer: Optimizer | None = None,
    *,
    mixed: bool = True,
    reproduce_bugs: bool = False,
    any_version: bool = False,
) -> T:
    """Makes a live SAE of another library run on saefast's ops: encode, decode, forward and training forward.

    Values, gradients and what is returned are the peer's, within rounding; hidden (B, L) tensors are not made.

    Args:
        sae: an SAE or transcoder of SAELens, a SparseCoder of sparsify, a dictionary of dictionary_learning; or a
            trainer of SAELens or dictionary_learning: its SAE, its optimiser and, of the latter, its `loss`.
        optimizer: a torch.optim.Adam or AdamW of the SAE's parameters: steps in its fused form from now on, the same
            mathematics in one pass over memory. Of an accelerated step its usual form is the dearest part.
        mixed: let bf16 products choose candidates for the k best of each token, and fp32 products decide among them,
            where that is faster. False: fp32 alone. See `saefast.ops.mixed`.
        reproduce_bugs: sparsify only: give AuxK and MultiTopK no encoder gradient, and let gradients through where ReLU
            clipped, as sparsify does.
        any_version: go ahead with a version of the peer's package that saefast has not been tested against.

    Returns:
        The very same object.

    Raises:
        InputError: a class, a version of a package or an optimiser that is not known.
    """
    for option, value in (("mixed", mixed), ("reproduce_bugs", reproduce_bugs), ("any_version", any_version)):
        if not isinstance(value, bool):
            raise InputError(f"{option} is {value!r}: expected True or False")
    package, name, kind = _known(sae)
    if not any_version:
        _check_version(package)
    thing: Any = sae
    if NAME in vars(thing):
        restore(thing)
    if kind.inside is not None:
        accelerate(getattr(thing, kind.inside), mixed=mixed, reproduce_bugs=reproduce_bugs, any_version=any_version)
        optimizer = optimizer or (thing.optimizer if type(thing.optimizer) is Adam else None)
    if optimizer is not None:
        fuse(optimizer)
    guard()
    state = State(package, name, mixed, reproduce_bugs, tuple(kind.methods))
    setattr(thing, NAME, state)
    if kind.inside is None and isinstance(thing, nn.Module):
        for matrix in kind.columns + kind.rows:
            latents(thing, matrix, is_turned=matrix in kind.columns)
        thing.register_state_dict_post_hook(contiguous_state)
    for method, function in kind.methods.items():
        # A partial is copied and pickled with the object that it holds; a closure is not.
        setattr(thing, method, functools.partial(function, thing))
    return sae


def restore(sae: T, optimizer: Optimizer | None = None) -> T:
    """Undoes `accelerate`: the object's own methods, and its matrices as they lay. One that is not is left alone.

    Args:
        optimizer: what was given to `accelerate`; a trainer's is known.
    """
    thing: Any = sae
    if optimizer is not None:
        unfuse(optimizer)
    if NAME not in getattr(thing, "__dict__", ()):
        return sae
    state = state_of(thing)
    for method in state.methods:
        delattr(thing, method)
    inside = PACKAGES[state.package].kinds[state.kind].inside
    if inside is not None:
        restore(getattr(thing, inside), thing.optimizer)
    elif isinstance(thing, nn.Module):
        put_back(thing, state.laid_out)
        release(thing)
        hooks = thing._state_dict_hooks
        for key in [key for key, hook in hooks.items() if hook is contiguous_state]:
            del hooks[key]
    delattr(thing, NAME)
    return sae


def _known(sae: object) -> tuple[str, str, Kind]:
    """The package, class name and kind of an object; of a subclass, those of the class that it is made from."""
    for base in type(sae).__mro__:
        package = base.__module__.split(".")[0]
        kind = PACKAGES[package].kinds.get(base.__name__) if package in PACKAGES else None
        if kind is not None:
            _check_own_methods(type(sae), base, kind)
            return package, base.__name__, kind
    raise InputError(f"sae is a {_full(type(sae))}, which accelerate() does not know: expected {_which()}")


def _check_own_methods(given: type, known: type, kind: Kind) -> None:
    for method in (*kind.methods, *kind.stands_for):
        if getattr(given, method, None) is not getattr(known, method, None):
            raise InputError(
                f"sae is a {_full(given)}, which has its own {method}(): accelerate() knows {_full(known)}, and would "
                "not call it; give an object of that class, or call saefast.ops in your method"
            )


def _check_version(package: str) -> None:
    distribution, known, _ = PACKAGES[package]
    found = installed_version(distribution)
    if not any(found == version or (version.endswith(".") and found.startswith(version)) for version in known):
        expected = " or ".join(version + "*" * version.endswith(".") for version in known)
        raise InputError(
            f"{distribution} is at version {found}: accelerate() knows {expected}; install that, or pass "
            "any_version=True and compare what it gives with the unaccelerated object's"
        )


def installed_version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _full(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _which() -> str:
    """The classes that are known."""
    return "; ".join(f"{name}'s {', '.join(package.kinds)}" for name, package in PACKAGES.items())
