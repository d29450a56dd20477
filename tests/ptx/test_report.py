"""docs/ptx.md holds the tables that `make ptx` kept, and they are those of kernels without a fault."""

import json

import pytest

from ptx.report import KEPT, PAGE, as_data, count, markdown, page


@pytest.fixture
def found() -> dict:
    return json.loads(KEPT.read_text(encoding="utf-8"))


def test_the_page_holds_what_was_found(found: dict) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text, found) == text


def test_nothing_failed(found: dict) -> None:
    assert sum(row["launches"] for row in found["launches"]) > 500
    assert {row["sm"] for row in found["launches"]} == {80, 90}
    for row in found["launches"]:
        assert row["failed"] == row["faults"] == 0, row
        assert row["share"] <= 1
    assert count(found["experiments"], "missed") == 0
    assert count(found["experiments"], "caught") > 0.8 * sum(e["count"] for e in found["experiments"])


def test_tables_of_nothing() -> None:
    assert "Caught: 0 of 0" in markdown(as_data([], []))
