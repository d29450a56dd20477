"""The table of latents and a latent's page in a browser: walked by mouse and keyboard, sorted, searched, labelled."""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from browsing import Faults, Open, explored
from made_up_run import make_run

from saefast.latents.database import LatentsDB

pytestmark = pytest.mark.browser

ROWS = "table.latents tbody tr"


@pytest.fixture(scope="module")
def db(shown: tuple[Any, str]) -> LatentsDB:
    found: LatentsDB = shown[0].db
    return found


def numbers(page: Any) -> list[int]:
    """The latents of the table, from the top."""
    return [int(text) for text in page.locator(f"{ROWS} td.id").all_inner_texts()]


def asked(page: Any) -> dict[str, list[str]]:
    return parse_qs(urlsplit(page.url).query)


def focused_row(page: Any) -> int:
    found: int = page.evaluate(
        "[...document.querySelectorAll('tbody tr')].findIndex(r => r.contains(document.activeElement))"
    )
    return found


def test_pages_follow_each_other_and_the_back_button_works(visit: Open, db: LatentsDB) -> None:
    page = visit("/")
    seen = numbers(page)
    assert seen == [row.latent for row in db.page("telling")[0]]
    page.get_by_role("link", name="On →").click()
    page.wait_for_url("**page=2*")
    page.keyboard.press("n")
    page.wait_for_url("**page=3*")
    rest = [row.latent for row in db.page("telling", offset=100)[0]]
    assert numbers(page) == rest
    assert len(rest) == 30
    page.keyboard.press("p")
    page.wait_for_url("**page=2*")
    page.go_back()
    page.go_back()
    page.go_back()
    assert numbers(page) == seen


def test_a_head_sorts_by_its_column_and_again_the_other_way(visit: Open, db: LatentsDB) -> None:
    page = visit("/?show=alive")
    head = page.locator("th", has_text="Max")
    for descending in (True, False):
        head.get_by_role("link").click()
        page.wait_for_url("**sort=max_act*" if descending else "**order=reverse*")
        assert asked(page)["show"] == ["alive"]
        assert numbers(page) == [row.latent for row in db.page("max_act", descending, dead=False)[0]]
        assert head.get_attribute("aria-sort") == ("descending" if descending else "ascending")


def test_a_choice_takes_effect_at_once_and_ranges_with_enter(visit: Open, db: LatentsDB) -> None:
    page = visit("/")
    page.get_by_role("combobox", name="Show").select_option("dead")
    page.wait_for_url("**show=dead*")
    assert numbers(page) == [0]
    page.get_by_role("combobox", name="Show").select_option("all")
    page.wait_for_url(re.compile("/$"))
    page.get_by_text("Ranges").click()
    page.get_by_label("density, % from").fill("1")
    page.get_by_label("density, % from").press("Enter")
    page.wait_for_url("**density_from=1*")
    assert set(asked(page)) == {"density_from"}
    assert all(db.latent(latent).density >= 0.01 for latent in numbers(page))
    page.get_by_role("link", name="Clear").click()
    page.wait_for_url(re.compile("/$"))


def test_keys_walk_the_rows_and_open_one(visit: Open) -> None:
    page = visit("/")
    second = numbers(page)[1]
    for _ in "jjj":
        page.keyboard.press("j")
    page.keyboard.press("k")
    assert focused_row(page) == 1
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/latent/{second}?*")
    assert page.locator("#number").inner_text() == str(second)


def test_a_slash_searches_and_hits_can_be_opened(visit: Open) -> None:
    page = visit("/")
    page.keyboard.press("/")
    page.keyboard.type("bridge")
    page.keyboard.press("Enter")
    page.wait_for_url("**q=bridge*")
    found = numbers(page)
    assert found
    assert "bridge" in page.locator("h1").inner_text()
    assert page.locator("#search").input_value() == "bridge"
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    assert focused_row(page) == 0
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/latent/{found[0]}")


def test_what_nothing_fires_on_is_said(visit: Open) -> None:
    page = visit("/?q=zzzzzz")
    assert "No latent fires on it" in page.locator(".nothing").inner_text()


def test_the_help_names_the_keys_and_closes(visit: Open) -> None:
    page = visit("/")
    page.keyboard.press("?")
    help_ = page.get_by_role("dialog")
    assert "search" in help_.inner_text()
    page.keyboard.press("Escape")
    assert help_.is_hidden()
    page.keyboard.press("?")
    help_.get_by_role("button", name="Close").click()
    assert help_.is_hidden()


def test_a_latent_shows_its_activations_and_leads_to_its_relatives(visit: Open, db: LatentsDB) -> None:
    page = visit("/latent/5")
    example = db.examples(5, 0)[0]
    first = page.locator(".contexts li").first
    assert "".join(example.context.pieces).strip() in first.locator(".text").inner_text()
    values = first.locator(".text span[title]").evaluate_all("all => all.map(e => e.title)")
    assert len(values) == (example.acts > 0).sum()
    peak = first.locator(".peak")
    assert peak.inner_text().strip() == example.context.pieces[example.peak].strip()
    colours = [
        place.evaluate("e => getComputedStyle(e).backgroundColor")
        for place in (first.locator(".text span[title]").nth(0), peak)
    ]
    assert all(colour != "rgba(0, 0, 0, 0)" for colour in colours)
    relative = page.locator(".relatives a").first
    other = relative.get_attribute("href")
    relative.click()
    page.wait_for_url(f"**{other}")
    assert f"/latent/{db.neighbours(5)[0].latent}" == other


def test_keys_on_a_latents_page(visit: Open, db: LatentsDB) -> None:
    order = [row.latent for row in db.page("score")[0]]
    page = visit("/?sort=score")
    page.locator(f"{ROWS} td.id a").first.click()
    page.wait_for_url(f"**/latent/{order[0]}?*")
    page.keyboard.press("n")
    page.wait_for_url(f"**/latent/{order[1]}?*")
    page.keyboard.press("j")
    page.keyboard.press("j")
    at = page.evaluate("[...document.querySelectorAll('[data-walk]')].indexOf(document.activeElement)")
    assert at == 1
    page.keyboard.press("w")
    page.wait_for_url("**wide*")
    assert page.locator(".beside").count() > 0
    page.keyboard.press("p")
    page.wait_for_url(f"**/latent/{order[0]}?*")


def test_the_number_and_the_command_can_be_copied(visit: Open) -> None:
    page = visit("/latent/7", permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy number").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "7"
    page.get_by_role("button", name="Copy", exact=True).click()
    assert page.locator("code.command").inner_text().startswith("saefast steer")


@pytest.fixture
def labelled(browser: Any, tmp_path: Any) -> Iterator[tuple[Any, str]]:
    """A run of its own, because it is written to."""
    with explored(make_run(tmp_path)) as found:
        yield found


def test_a_label_is_written_and_is_there_when_one_comes_back(
    browser: Any, labelled: tuple[Any, str], faults: Faults
) -> None:
    from browsing import pages

    explorer, address = labelled
    words = "bridges <b>& „Brücken“"
    with pages(browser, address, faults, explorer.token) as open_page:
        page = open_page("/latent/9")
        page.keyboard.press("l")
        page.keyboard.type(words)
        page.keyboard.press("Enter")
        page.get_by_text("Saved.").wait_for()
        assert explorer.db.latent(9).label == words
        page.reload()
        assert page.locator("#label").input_value() == words
        assert words in page.locator("h1").inner_text()
        page.goto(f"{address}/?show=labelled")
        assert page.locator(f"{ROWS} .label").all_inner_texts() == [words]
        page.goto(f"{address}/latent/9")
        page.locator("#label").fill("")
        page.get_by_role("button", name="Save").click()
        page.get_by_text("Taken away.").wait_for()
        assert explorer.db.label_of(9) is None
