"""Places in a model: how they are written, and that taking and replacing mean the same value of the same turn."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saefast.errors import InputError
from saefast.places import Place, Taken, activations, by_token, replaced, visited


@pytest.mark.parametrize(
    ("written", "place"),
    [
        ("h.3", Place("h.3")),
        ("h.3:in", Place("h.3", "in")),
        ("h.3:out", Place("h.3")),
        ("h.3@2", Place("h.3", "out", 2)),
        ("h.3@-1:in", Place("h.3", "in", -1)),
        ("h.3@0:out", Place("h.3", "out", 0)),
        ("", Place("")),
        ("a@b", Place("a@b")),
    ],
)
def test_a_place_is_read_as_it_is_written(written: str, place: Place) -> None:
    assert Place.read(written) == place
    assert str(place) == written.removesuffix(":out")


class Loop(nn.Module):
    """Runs one block some times, each time after its turn's number was added; then a head."""

    def __init__(self, turns: int = 4) -> None:
        super().__init__()
        self.turns, self.block, self.head, self.never = turns, nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for number in range(self.turns):
            x = self.block(x + number)
        return self.head(x)


def values(model: nn.Module, x: Tensor, *places: Place) -> list[Tensor]:
    taken = Taken(places)
    with torch.no_grad(), visited(model, places, taken.take):
        model(x)
    return [taken.value(place) for place in places]


def by_hand(model: Loop, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of the block."""
    ins, outs = [], []
    with torch.no_grad():
        for number in range(model.turns):
            ins.append(x + number)
            x = model.block(ins[-1])
            outs.append(x)
    return ins, outs


def test_every_turn_is_taken_on_both_sides_counted_from_both_ends() -> None:
    model, x = Loop(), torch.randn(2, 5, 3)
    ins, outs = by_hand(model, x)
    for number in range(4):
        for turn in (number, number - 4):
            gave, took = values(model, x, Place("block", "out", turn), Place("block", "in", turn))
            assert torch.equal(gave, outs[number])
            assert torch.equal(took, ins[number])


def test_turns_that_are_not_there_or_not_named_are_refused_by_taking_and_by_replacing() -> None:
    model, x = Loop(), torch.randn(1, 2, 3)
    for place, message in (
        (
            Place("block"),
            r"'block' runs 4 times in one forward pass: name the turn, block@0 \.\.\. block@3, or b",
        ),
        (Place("block", "in"), r"name the turn, block@0:in \.\.\. block@3:in, or block@-1:in for the last"),
        (Place("block", turn=4), r"'block@4': that module ran 4 times .* turns are 0 \.\.\. 3, or -1 \.\.\. -4"),
        (Place("block", turn=-5), "'block@-5': that module ran 4 times"),
        (Place("never"), "'never' never fired"),
    ):
        with pytest.raises(InputError, match=message) as error:
            values(model, x, place)
        assert "\n" not in str(error.value)
        with pytest.raises(InputError, match=message), replaced(model, {place: torch.zeros_like}, {place: 4}):
            model(x)
    assert not model.block._forward_hooks
    assert not model.block._forward_pre_hooks


@torch.no_grad()
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("turn", [0, 2, 3, -1, -2])
def test_a_value_is_replaced_at_its_turn_alone(turn: int, side: Any) -> None:
    model, x, place = Loop(), torch.randn(2, 5, 3), Place("block", side, turn)
    other = torch.randn(2, 5, 3)
    with replaced(model, {place: lambda _: other}, {place: 4}):
        seen = model(x)
    expected = x
    for number in range(4):
        expected = expected + number
        chosen = number == turn % 4
        expected = other if chosen and side == "in" else expected
        expected = model.block(expected)
        expected = other if chosen and side == "out" else expected
    assert torch.equal(seen, model.head(expected))
    # What was taken, put back, changes nothing.
    (value,) = values(model, x, place)
    with replaced(model, {place: lambda _: value}, {place: 4}):
        assert torch.equal(model(x), model.head(by_hand(model, x)[1][-1]))


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        # After each call: of the block four times, of the head once where it is among the places.
        ((Place("block", turn=2),), [False, False, True, True]),
        ((Place("block", turn=2), Place("head")), [False, False, False, False, True]),
        ((Place("block", turn=-4),), [False, False, False, False]),
    ],
)
def test_a_pass_is_complete_when_each_place_had_its_turn_and_none_is_counted_from_the_last(
    places: tuple[Place, ...], expected: list[bool]
) -> None:
    taken, seen = Taken(places), []

    def visit(place: Place, given: Any) -> None:
        taken.take(place, given)
        seen.append(taken.complete())

    model = Loop()
    with visited(model, places, visit):
        model(torch.randn(1, 1, 3))
    assert seen == expected


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).add_(1000)


def test_what_was_taken_stays_when_the_model_overwrites_its_tensor() -> None:
    model, x = InPlace(), torch.randn(1, 2, 3)
    (value,) = values(model, x, Place("block"))
    assert torch.equal(value, model.block(x))


class Named(nn.Module):
    """Calls its block as `call` does."""

    def __init__(self, block: nn.Module, call: Any) -> None:
        super().__init__()
        self.block, self.call = block, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.block, x)


class Block(nn.Module):
    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        return 2 * hidden_states


class Any_(nn.Module):
    """A forward that does not say what it takes, as wrappers have it."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * kwargs["hidden_states"]


class First(nn.Module):
    def forward(self, query: Tensor, mask: Tensor | None = None) -> Tensor:
        return 2 * query


@pytest.mark.parametrize(
    ("block", "call"),
    [
        (Block(), lambda block, x: block(x)),
        (Block(), lambda block, x: block(x, mask=x + 1)),
        (Block(), lambda block, x: block(mask=x + 1, hidden_states=x)),
        (Any_(), lambda block, x: block(mask=x + 1, hidden_states=x)),
        (First(), lambda block, x: block(mask=x + 1, query=x)),
    ],
)
def test_the_first_input_is_found_and_replaced_however_it_is_passed(block: nn.Module, call: Any) -> None:
    model, x, place = Named(block, call), torch.randn(2, 3, 4), Place("block", "in")
    assert torch.equal(values(model, x, place)[0], x)
    with replaced(model, {place: lambda x: x + 5}):
        assert torch.equal(model(x), 2 * (x + 5))


def test_a_module_without_an_input_is_refused() -> None:
    class Nothing(nn.Module):
        def forward(self) -> Tensor:
            return torch.zeros(1, 1, 1)

    with pytest.raises(InputError, match="'block:in': that module is called without an input"):
        values(Named(Nothing(), lambda block, x: block()), torch.zeros(1, 1, 1), Place("block", "in"))


Pair = namedtuple("Pair", "hidden other")


@pytest.mark.parametrize("make", [tuple, list, lambda items: Pair(*items)])
def test_heads_and_tuples_are_flattened_alike_and_put_back_as_they_were(make: Any) -> None:
    x = torch.randn(2, 3, 4, 5)
    model = Named(Named(nn.Identity(), lambda block, x: make([block(x), "kept"])), lambda block, x: block(x))
    (value,) = values(model, x, Place("block"))
    assert torch.equal(value, x.flatten(2))
    with replaced(model, {Place("block"): lambda x: x + 1}):
        given = model(x)
    assert type(given) is type(make([1, 2]))
    assert torch.equal(given[0], x + 1)
    assert given[1] == "kept"


@pytest.mark.parametrize("given", [torch.zeros(2, 3), torch.zeros(1, 2, 3, dtype=torch.int64), "text", (), None])
def test_what_is_no_activation_is_refused_in_one_line(given: Any) -> None:
    with pytest.raises(InputError, match=r"hook 'h' gives .*expected activations of shape \(batch, length, width\)"):
        activations(given, "h")


def test_activations_by_token_are_put_right_or_refused() -> None:
    x = torch.randn(3, 4, 5)
    shaped = by_token(3, (4,))
    for given in (x, x.flatten(0, 1), x.unflatten(2, (5, 1)), (x, "kept")):
        assert torch.equal(shaped(given, "h"), x)
    for given in (x[:2], x[:, :3], x.transpose(0, 1), x.flatten(0, 1)[:-1], (x.flatten(0, 1), "kept")):
        with pytest.raises(InputError, match=r"hook 'h' gives .*expected"):
            shaped(given, "h")
    # A decoder has a start token more.
    longer = by_token(3, (4, 5))
    assert longer(torch.zeros(3, 5, 2), "h").shape == (3, 5, 2)
    assert longer(torch.zeros(3, 4, 2), "h").shape == (3, 4, 2)


def test_one_sequence_tells_that_length_stands_before_batch_where_as_many_sequences_as_tokens_would_not() -> None:
    turned: set[str] = set()
    square, x = torch.randn(4, 4, 5), torch.randn(4, 1, 5)
    assert torch.equal(by_token(1, (4,), turned)(x.transpose(0, 1), "usual"), x.transpose(0, 1))
    assert torch.equal(by_token(1, (4,), turned)(x, "turned"), x.transpose(0, 1))
    assert turned == {"turned"}
    assert torch.equal(by_token(4, (4,), turned)(square, "turned"), square.transpose(0, 1))
    assert torch.equal(by_token(4, (4,), turned)(square, "usual"), square)
