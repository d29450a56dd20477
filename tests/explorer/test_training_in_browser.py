"""The curves of a run in a browser: drawn, read by mouse and by keyboard, and growing while the run goes on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import Open, explored
from made_up_run import make_run, write_metrics

pytestmark = pytest.mark.browser

FVU = ".chart:has(h2:text('unexplained'))"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run(tmp_path)


# One of its own for each test, because its folder is written to.
@pytest.fixture
def shown(run_folder: Path) -> Iterator[tuple[Any, str]]:
    with explored(run_folder) as found:
        yield found


def test_curves_are_drawn_and_their_last_values_stand_beside_them(visit: Open) -> None:
    page = visit("/training")
    page.wait_for_selector(f"{FVU} svg path")
    assert page.locator("#is").inner_text() == "finished"
    assert "step 60 of 60" in page.locator("#how-far").inner_text()
    assert page.locator(f"{FVU} li:has-text('training batches') b").inner_text() == "0.212"
    assert page.locator("dt:text-is('FVU') + dd").inner_text() == "0.210"
    assert page.locator(".chart:visible").count() >= 5
    assert page.locator(".chart:has(h2:text('Gradient'))").is_hidden()


def test_arrow_keys_read_a_curve(visit: Open) -> None:
    page = visit("/training")
    page.wait_for_selector(f"{FVU} svg path")
    plot = page.locator(f"{FVU} .plot")
    plot.focus()
    plot.press("Home")
    assert plot.get_attribute("aria-valuenow") == "256"
    assert page.locator(f"{FVU} li:has-text('training batches') b").inner_text() == "0.900"
    plot.press("ArrowRight")
    assert plot.get_attribute("aria-valuenow") == "512"
    assert page.locator(f"{FVU} li:has-text('training batches') b").inner_text() == "0.550"
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    assert float(plot.get_attribute("aria-valuenow")) == pytest.approx(256 * 30, rel=0.2)


def test_an_axis_becomes_logarithmic_and_back(visit: Open) -> None:
    page = visit("/training")
    page.wait_for_selector(f"{FVU} svg path")
    button, path = page.get_by_role("button", name="log").first, page.locator(f"{FVU} svg path").first
    assert button.get_attribute("aria-pressed") == "true"
    drawn = path.get_attribute("d")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert path.get_attribute("d") != drawn


def test_curves_grow_while_a_run_goes_on(visit: Open, run_folder: Path) -> None:
    from playwright.sync_api import expect

    write_metrics(run_folder, 10, 60)
    page = visit("/training")
    expect(page.locator("#how-far")).to_contain_text("step 10 of 60")
    assert page.locator("#is").inner_text() == "live"
    write_metrics(run_folder, 40, 60)
    expect(page.locator("#how-far")).to_contain_text("step 40 of 60")
    assert page.locator(f"{FVU} li:has-text('training batches') b").inner_text() == "0.218"
