"""Declared shapes of JSON: what fits passes unchanged, what does not is named with its file, field, value and type."""

from typing import Annotated, Any, Literal, TypedDict

import pytest

from saefast.errors import InputError
from saefast.schema import Count, Seed, check, check_argument, words


class Part(TypedDict):
    file: str
    rows: Count


class Declared(TypedDict):
    parts: list[Part]
    kind: Literal["a", "b"]
    share: float
    by_name: dict[str, list[int]]
    limit: int | None


class Whole(Declared, total=False):
    note: str
    anything: Any


GOOD: dict[str, Any] = {
    "parts": [{"file": "x", "rows": 0}, {"file": "y", "rows": 2**63 - 1}],
    "kind": "a",
    "share": 0.5,
    "by_name": {"one": [1, 2], "none": []},
    "limit": None,
    "unknown keys": "are left to the reader",
}


def test_what_fits_is_returned_as_it_is() -> None:
    for value in (GOOD, GOOD | {"share": 1, "limit": 3, "note": "x", "anything": [{}], "parts": []}):
        assert check(value, Whole, "f") is value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": {}}, "f: parts is dict of 0, expected a list of an object"),
        ({"parts": [GOOD["parts"][0], 3]}, r"f: parts\[1\] is 3, expected an object"),
        ({"parts": [{"file": "x"}]}, r"f: parts\[0\]\.rows is missing"),
        (
            {"parts": [{"file": "x", "rows": -1}]},
            r"f: parts\[0\]\.rows is -1, expected int from 0 to 9223372036854775807",
        ),
        ({"parts": [{"file": "x", "rows": 2**63}]}, r"f: parts\[0\]\.rows is 9223372036854775808, expected int"),
        ({"parts": [{"file": "x", "rows": True}]}, r"f: parts\[0\]\.rows is True, expected int"),
        ({"parts": [{"file": "x", "rows": 1.0}]}, r"f: parts\[0\]\.rows is 1\.0, expected int"),
        ({"kind": "c"}, "f: kind is 'c', expected one of a, b"),
        ({"kind": ["a"]}, "f: kind is list of 1, expected one of a, b"),
        ({"share": "0.5"}, "f: share is '0.5', expected float"),
        ({"share": False}, "f: share is False, expected float"),
        ({"by_name": {"one": [1, None]}}, r"f: by_name\.one\[1\] is None, expected int"),
        ({"by_name": []}, "f: by_name is list of 0, expected an object of a list of int"),
        ({"limit": "3"}, "f: limit is '3', expected int or None"),
        ({"note": None}, "f: note is None, expected str"),
        ({"note": ["x" * 5000]}, "f: note is list of 1, expected str"),
        ({"limit": "x" * 5000}, "f: limit is 'x{56}[.]{3}, expected int or None;"),
        ({"limit": "é\n\ud800"}, r"f: limit is '\\xe9\\n\\ud800', expected"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check(GOOD | change, Whole, "f")
    text = str(caught.value)
    assert "\n" not in text
    assert text.isascii()
    assert len(text) < 250


@pytest.mark.parametrize("value", [[], None, 1, "x"])
def test_anything_but_an_object_is_named(value: Any) -> None:
    with pytest.raises(InputError, match=r"f: its content is .*, expected an object"):
        check(value, Whole, "f")


def test_every_key_is_needed_unless_it_is_declared_otherwise() -> None:
    for key in Declared.__required_keys__:
        with pytest.raises(InputError, match=f"f: {key} is missing"):
            check({name: value for name, value in GOOD.items() if name != key}, Whole, "f")


def test_arguments_are_named_too() -> None:
    check_argument("seed", 0, Seed | None)
    check_argument("seed", None, Seed | None)
    for value in (-1, 2**63, 1.0, True, "0", 10**30):
        with pytest.raises(InputError, match=r"seed is .*: expected int from 0 to 9223372036854775807 or None"):
            check_argument("seed", value, Seed | None)


def test_words() -> None:
    assert words(dict[str, Any]) == "an object"
    assert words(Annotated[int, range(3)] | None) == "int from 0 to 2 or None"
