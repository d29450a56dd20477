"""Where SAEs are in a model: what each reads, where it may write, and both while the model runs."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saefast.errors import InputError
from saefast.harvest.capture import lens_hooks
from saefast.harvest.hooks import find_hook
from saefast.harvest.language_models import inner_module
from saefast.integrations.passes import Pass, Passes, in_backward
from saefast.models.sae import SAE
from saefast.places import Place, activations, by_token, visited, with_activations
from saefast.training.spliced_model import own_hooks

SAEs = SAE | Mapping[str, SAE] | Sequence[SAE]
Hooks = str | Sequence[str]


@dataclass(frozen=True)
class Site:
    """An SAE in a model. reads: the places whose values, side by side, it takes; writes: where what it gives belongs,
    the same ones but for transcoders."""

    name: str
    sae: SAE
    reads: tuple[Place, ...]
    writes: tuple[Place, ...]

    @property
    def write(self) -> Place:
        """The one place that it writes. Raises InputError where it reconstructs several."""
        if len(self.writes) > 1 or len(self.sae.architecture.target_parts()) > 1:
            raise InputError(
                f"the SAE at {self.name} reconstructs several places at once, and none of them is known before the "
                "last has been read: it can be recorded, but nothing can be put in their place"
            )
        return self.writes[0]


def find_sites(model: Any, saes: SAEs, hook: Hooks | None = None, target_hook: Hooks | None = None) -> list[Site]:
    """The sites of one SAE, or of several, by the names of their hooks or of those in their metadata.

    Args:
        model: of transformers, any torch module, or anything with add_hook and run_with_hooks (TransformerLens').
        hook, target_hook: of a single SAE, what it takes and what it gives, instead of what its metadata says.

    Raises:
        InputError: no such hook; SAEs that are none; two of one name.
    """
    require_hookable(model)
    if isinstance(saes, SAE):
        return [_site(model, None, saes, hook, target_hook)]
    if hook is not None or target_hook is not None:
        raise InputError("hook is given for several SAEs: give them as {hook: sae} instead")
    if not isinstance(saes, Mapping | Sequence) or isinstance(saes, str) or not saes:
        raise InputError(f"saes is a {type(saes).__name__}: expected an SAE, several, or {{hook: sae}}")
    named = list(saes.items()) if isinstance(saes, Mapping) else [(None, sae) for sae in saes]
    for name, sae in named:
        if not isinstance(sae, SAE) or not isinstance(name, str | None):
            raise InputError(f"saes holds {name!a}: a {type(sae).__name__}; expected an SAE under the name of its hook")
    sites = [_site(model, name, sae, name, None) for name, sae in named]
    if len({site.name for site in sites}) < len(sites):
        names = ", ".join(site.name for site in sites)
        raise InputError(f"saes are at {names}: two have one name; give them as {{hook: sae}}, or one after the other")
    return sites


def _site(model: Any, name: str | None, sae: SAE, hook: Any, target_hook: Any) -> Site:
    hooks, targets = own_hooks(sae, hook, target_hook)
    found = ([place for one in names for place in places_of(model, one)] for names in (hooks, targets))
    reads, writes = map(tuple, found)
    for place in (*reads, *writes):
        if place.turn is not None and place.turn < 0:
            raise InputError(
                f"hook {str(place)!r} counts turns from the last, which is known only when the pass is over: count "
                "from the first, as in @0"
            )
    return Site(name or ",".join(hooks), sae, reads, writes)


def places_of(model: Any, name: str) -> tuple[Place, ...]:
    """The places that a hook name means in a model. Raises InputError with the nearest names that exist."""
    if is_lens(model):
        return lens_hooks(model, [name])[0].places
    return find_hook(model, name).places


def is_lens(model: Any) -> bool:
    return hasattr(model, "run_with_hooks") and hasattr(model, "add_hook")


def device_of(model: Any) -> torch.device:
    """Where a model's first weights are."""
    require_hookable(model)
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def require_hookable(model: Any) -> None:
    """Raises InputError for what no hook can be put on, or where it would not be seen."""
    if not isinstance(model, nn.Module):
        hint = "; of nnsight's models give the module inside" if inner_module(model) is not model else ""
        expected = f"expected a model of transformers or TransformerLens{hint}"
        raise InputError(f"model is a {type(model).__name__}: {expected}")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise InputError(
            "model is compiled, and torch.compile does not see hooks that come later: give the model as it was before "
            "(model._orig_mod), or compile it within the block"
        )


Read = Callable[[Site, Tensor, Pass, int], None]
Write = Callable[[Site, Tensor, Pass], Tensor]


@contextlib.contextmanager
def at_sites(
    model: Any, sites: Sequence[Site], read: Read, write: Write | None = None, passes: Passes | None = None
) -> Iterator[None]:
    """While open, in every forward pass: read(site, x, pass, number) is given x (batch, length, d_in) once all that the
    SAE takes is there, and write(site, y, pass), where there is one, gives what stands in the place of y afterwards.

    Raises:
        InputError: while the model runs, for a place of another width or one that runs several times where no turn is
            named; at the end, where the model ran and a place had no turn.
    """
    passes = Passes(model) if passes is None else passes
    visits = _Visits(passes, sites, read, write)
    with contextlib.ExitStack() as stack:
        stack.enter_context(passes.attached())
        stack.enter_context(_hooked(model, visits.places, visits.visit))
        yield
    visits.check()


@contextlib.contextmanager
def _hooked(model: Any, places: Iterable[Place], visit: Callable[[Place, Any], Any]) -> Iterator[None]:
    """As `visited`, of either kind of model."""
    if not is_lens(model):
        with visited(model, places, visit):
            yield
        return
    # By TransformerLens' own way: its hook points may turn values before and after a hook.
    hooks = [(place.path, _lens_hook(place, visit)) for place in places]
    with model.hooks(fwd_hooks=hooks):
        yield


def _lens_hook(place: Place, visit: Callable[[Place, Any], Any]) -> Callable[..., Any]:
    def take(activation: Any, hook: Any = None) -> Any:
        return visit(place, activation)

    return take


class _Visits:
    """What happens at the places of some sites, turn by turn."""

    def __init__(self, passes: Passes, sites: Sequence[Site], read: Read, write: Write | None) -> None:
        self._passes, self._sites, self._read, self._write = passes, sites, read, write
        written = [site.write for site in sites] if write is not None else []
        if len(set(written)) < len(written):
            raise InputError("two SAEs write one place: open one block within the other, in the order that is meant")
        self.places = list(dict.fromkeys([*(p for site in sites for p in site.reads), *written]))
        self._number = 0
        self._calls: dict[Place, int] = {}
        self._parts: dict[str, dict[Place, Tensor]] = {}
        self._seen: set[Place] = set()

    def visit(self, place: Place, given: Any) -> Any:
        if not self._its_turn(place):
            return None
        for site in self._sites:
            if place in site.reads:
                self._take(site, place, given)
        new = None
        for site in self._sites:
            if self._write is not None and place == site.write:
                new = given = self._put(site, given)
        return new

    def check(self) -> None:
        """Raises InputError where the model ran and a place had no turn."""
        missing = [place for place in self.places if place not in self._seen]
        if missing and self._passes.number:
            raise InputError(
                f"hook {str(missing[0])!r} never fired: the model's forward pass does not run that module, or not so "
                "often; the block did nothing there"
            )

    def _its_turn(self, place: Place) -> bool:
        if self._number != self._passes.number or not self._passes.counted:
            self._number, self._calls, self._parts = self._passes.number, {}, {}
        if in_backward():
            # Activations that were not kept are computed again, and have to come out the same.
            if place.turn is not None:
                raise InputError(f"hook {str(place)!r} names a turn, which gradient checkpointing loses: switch it off")
            return self._write is not None
        turn = self._calls[place] = self._calls.get(place, -1) + 1
        if place.turn is None and turn > 0:
            raise InputError(
                f"hook {str(place)!r} runs several times in one forward pass: name the turn, "
                f"{Place(place.path, place.side, 0)} for the first"
            )
        if turn == (place.turn or 0):
            self._seen.add(place)
        return turn == (place.turn or 0)

    def _take(self, site: Site, place: Place, given: Any) -> None:
        value = self._shaped(given, place)
        if len(site.reads) == 1:
            x = value
        else:
            parts = self._parts.setdefault(site.name, {})
            # The model may go on to change its tensor in place.
            parts[place] = value.clone()
            if len(parts) < len(site.reads):
                return
            x = torch.cat([parts[one] for one in site.reads], -1)
        _check_width(site, "takes", site.reads, x, site.sae.config.d_in)
        self._read(site, x, self._pass(x), self._number)

    def _put(self, site: Site, given: Any) -> Any:
        y = self._shaped(given, site.write)
        _check_width(site, "gives", site.writes, y, site.sae.d_out)
        assert self._write is not None
        return with_activations(given, self._write(site, y, self._pass(y)))

    def _shaped(self, given: Any, place: Place) -> Tensor:
        now = self._passes.current
        if now is None or (not self._passes.counted and not in_backward()):
            return activations(given, str(place))
        return by_token(now.batch, (now.length,))(given, str(place))

    def _pass(self, x: Tensor) -> Pass:
        """The pass under way, or what the shape of x (batch, length, d) says of it."""
        now = self._passes.current
        return now if now is not None and (now.batch, now.length) == x.shape[:2] else Pass(x.shape[0], x.shape[1])


def _check_width(site: Site, what: str, places: Sequence[Place], x: Tensor, width: int) -> None:
    if x.shape[-1] != width:
        where = "+".join(map(str, places))
        raise InputError(
            f"hook {where} gives rows of width {x.shape[-1]}, the SAE {what} rows of {width}: name the hook it is of"
        )
