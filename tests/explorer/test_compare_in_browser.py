"""Two runs side by side in a browser: the page waits for what is compared, lists it, and fits where it is looked at."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import Open, served
from two_runs import decoders, make_run

pytestmark = pytest.mark.browser

CHECKS = Path(__file__).with_name("page_checks.js").read_text(encoding="utf-8")
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    from saefast.explorer.app import make_app
    from saefast.explorer.state import Explorer

    folder, (a, b) = tmp_path_factory.mktemp("runs"), decoders()
    explorer = Explorer.of_run(make_run(folder / "first", a), make_run(folder / "second", b, seed=1))

    def app(port: int) -> Any:
        explorer.port = port
        return make_app(explorer)

    with served(app) as address:
        yield explorer, address


def ready(visit: Open, path: str = "/compare", **settings: Any) -> Any:
    """The page, once it has what it waits for."""
    page = visit(path, **settings)
    page.wait_for_selector("#list")
    return page


def test_a_page_that_waits_shows_what_was_found_by_itself(visit: Open) -> None:
    page = ready(visit)
    assert page.locator(".row").count() == 20
    assert page.locator("[aria-current=true]").inner_text().startswith("in both 5")
    assert page.locator(".histogram svg").count() == 2
    assert page.is_hidden("#working")


def test_lists_pages_and_keys(visit: Open) -> None:
    page = ready(visit)
    first = page.locator(".row h3").first.inner_text()
    page.keyboard.press("n")
    page.wait_for_url("**page=2#list")
    assert page.locator(".row h3").first.inner_text() != first
    page.keyboard.press("p")
    page.wait_for_url("**page=1#list")
    assert page.locator(".row h3").first.inner_text() == first
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.closest('.row') === document.querySelectorAll('.row')[1]")
    page.click("text=only in B")
    page.wait_for_url("**list=b**")
    assert page.locator(".row.b").count() > 0


def test_another_cosine_and_order_are_asked_for_as_they_are_chosen(visit: Open) -> None:
    page = ready(visit)
    pairs = page.locator("[aria-current=true] b").inner_text()
    page.focus("#alike")
    page.keyboard.press("End")
    page.wait_for_url("**alike=0.99**")
    assert page.inner_text("#alike-says") == "0.99"
    assert int(page.locator("[aria-current=true] b").inner_text()) < int(pairs)
    page.select_option("[name=sort]", "density")
    page.wait_for_url("**sort=density**")
    assert page.input_value("[name=sort]") == "density"
    assert page.input_value("#alike") == "0.99"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(visit: Open, scheme: str) -> None:
    for settings in (PHONE, {}):
        page = ready(visit, color_scheme=scheme, **settings)
        for check in ("wide", "pale", "structure"):
            assert page.evaluate(f"{CHECKS}.{check}()") == [], check


def test_bars_stand_where_their_cosines_are(visit: Open) -> None:
    page = ready(visit)
    # Latents in common have cosines close to 1: the last bar is the highest of those that are alike.
    heights = page.locator(".histogram >> nth=0 >> rect.alike").evaluate_all(
        "all => all.map(r => +r.getAttribute('height'))"
    )
    assert len(heights) == 15
    assert heights[-1] == max(heights) > 0
    assert page.locator(".histogram title").nth(49).text_content().strip().endswith("from 0.98 to 1.0")
