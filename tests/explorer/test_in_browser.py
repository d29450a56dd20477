"""What every page of the explorer holds to: room on a phone, colours that can be read, names for what is on it."""

import re
from pathlib import Path
from typing import Any

import pytest
from browsing import Faults, Open

pytestmark = pytest.mark.browser

CHECKS = Path(__file__).with_name("page_checks.js").read_text(encoding="utf-8")
PAGES = ("/", "/?q=bridge", "/latent/2", "/latent/0", "/training", "/map", "/compare", "/text")
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
# What has to be found by its name.
NAMED = ("button", "link", "textbox", "searchbox", "combobox", "checkbox", "radio", "slider", "img", "dialog")


def test_a_page_that_is_missing_says_so(visit: Open, faults: Faults) -> None:
    page = visit("/nowhere")
    assert page.locator("h1").inner_text() == "There is no such page."
    faults.expect("404")


def test_the_token_leaves_the_address(visit: Open, faults: Faults) -> None:
    page = visit("/nowhere?a=b")
    assert page.url.endswith("/nowhere?a=b")
    faults.expect("404")


def faults_of(page: Any, what: str) -> list[str]:
    found: list[str] = page.evaluate(f"{CHECKS}.{what}()")
    return found


def settled(page: Any) -> Any:
    """The page once its scripts have what they asked for."""
    page.wait_for_load_state("networkidle")
    return page


@pytest.mark.parametrize("path", PAGES)
def test_a_phone_has_one_column_that_fits(visit: Open, path: str) -> None:
    assert faults_of(settled(visit(path, **PHONE)), "wide") == []


@pytest.mark.parametrize("path", PAGES)
def test_what_is_on_it_has_a_name_and_can_be_read(visit: Open, path: str) -> None:
    page = settled(visit(path, color_scheme="light"))
    assert faults_of(page, "structure") == []
    seen = page.locator("body").aria_snapshot()
    nameless = re.findall(rf"^\s*- ((?:{'|'.join(NAMED)})(?: \[.*\])?:?)$", seen, flags=re.MULTILINE)
    assert nameless == [], seen
    assert (brightness(page) > 128, faults_of(page, "pale")) == (True, [])
    page.emulate_media(color_scheme="dark")
    assert (brightness(page) > 128, faults_of(page, "pale")) == (False, [])


def brightness(page: Any) -> float:
    """Of the paper, 0 to 255."""
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", paper)[:3])) / 3


def test_the_tab_key_begins_with_a_way_to_the_content(visit: Open) -> None:
    page = settled(visit("/training"))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.localName") == "main"
