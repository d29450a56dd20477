"""The text view in a browser: typed, read, shaded by what is clicked; and texts that would be scripts stay texts."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import Faults, Open, explored

pytestmark = pytest.mark.browser

CHECKS = Path(__file__).with_name("page_checks.js").read_text(encoding="utf-8")
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}

HOSTILE = '<img src=x onerror="window.ran=1"> </script><script>window.ran=1</script> שלום עולם \u202etxt 👩‍👩‍👧 w1'


class WordReader:
    """Every word is a token; the i-th has latent 2 + i at a share of its largest, and all have latent 1."""

    def read(self, words: str) -> Any:
        from saefast.explorer.reader import ReadText

        texts = ["", *re.findall(r"\s*\S+", words)]
        n = len(texts)
        idx = np.array([x for i in range(1, n) for x in (1 + i % 30, 1)], np.int32)
        acts = np.array([x for i in range(1, n) for x in (1.8 * i / n, 0.2)], np.float32)
        ptr = np.array([0, 0, *range(2, 2 * n, 2)], np.int64)
        kept = np.array([False] + [True] * (n - 1))
        return ReadText(np.arange(n, dtype=np.int32), texts, kept, [0, min(6, n - 1)], ptr, idx, acts, 5)

    def name(self, token: int) -> str:
        return "<s>"


@pytest.fixture(scope="module")
def shown(run_folder: Path) -> Iterator[tuple[Any, str]]:
    from saefast.explorer import text

    before = text._reader
    text._reader = lambda explorer: WordReader()  # type: ignore[assignment,return-value]
    try:
        with explored(run_folder) as found:
            yield found
    finally:
        text._reader = before


def read(page: Any, words: str) -> Any:
    page.get_by_text("The model is ready.").wait_for()
    page.locator("#words").fill(words)
    page.keyboard.press("Control+Enter")
    page.locator("#found").wait_for()
    return page


def faults_of(page: Any, what: str) -> list[str]:
    found: list[str] = page.evaluate(f"{CHECKS}.{what}()")
    return found


def shades(page: Any) -> list[str]:
    found: list[str] = page.locator("#tokens [role=option]").evaluate_all("all => all.map(e => e.classList[0])")
    return found


def test_a_click_shades_the_text_without_another_request(visit: Open) -> None:
    page = read(visit("/text"), "the old stone bridge")
    assert page.locator("#tokens .special").inner_text() == "<s>"
    assert "".join(page.locator("#tokens [role=option]").all_inner_texts()).split() == ["the", "old", "stone", "bridge"]
    asked: list[str] = []
    # A browser may look at the page's icon again when its address changes.
    page.on("request", lambda request: asked.append(request.url) if "/static/" not in request.url else None)
    page.locator("#tokens [role=option]", has_text="stone").click()
    assert page.locator("#of-token").inner_text() == "On “stone”"
    page.locator('#token-latents [data-latent="4"]').click()
    assert [shade != "s0" for shade in shades(page)] == [False, False, True, False]
    page.locator('#text-latents [data-latent="1"]').click()
    assert "s0" not in shades(page)
    assert page.locator("#shaded").inner_text().startswith("Shaded by latent 1")
    assert page.url.endswith("/text?latent=1")
    page.locator("#number").fill("7")
    page.keyboard.press("Enter")
    assert set(shades(page)) == {"s0"}
    assert "fires on no token of this text" in page.locator("#shaded").inner_text()
    assert asked == []


def test_it_is_walked_by_keys(visit: Open) -> None:
    page = read(visit("/text"), "the old stone bridge")
    page.locator("#tokens").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.locator("[aria-selected=true]").inner_text().strip() == "old"
    page.keyboard.press("Enter")
    pressed = page.locator("#token-latents [aria-pressed=true]")
    assert pressed.count() == 1
    assert page.locator("#tokens").get_attribute("aria-activedescendant") == "t2"


def test_every_token_has_its_latents_beside_it(visit: Open) -> None:
    page = read(visit("/text"), "the old stone bridge")
    page.get_by_role("button", name="Token by token").click()
    rows = page.locator("#rows .row")
    assert rows.count() == 5
    # Not inner_text: what is out of sight is not laid out.
    assert "left out, as in training" in rows.nth(0).text_content()
    assert rows.nth(1).locator("button").count() == 2
    rows.nth(3).locator("button").first.click()
    assert page.locator("#rows [aria-pressed=true]").count() == 1


def test_a_latents_page_leads_here_with_the_latent_chosen(visit: Open) -> None:
    page = read(visit("/text?latent=3"), "the old stone bridge")
    assert page.locator("#shaded").inner_text().startswith("Shaded by latent 3")
    assert [shade != "s0" for shade in shades(page)] == [False, True, False, False]


def test_what_cannot_be_read_is_said(visit: Open, faults: Faults) -> None:
    page = visit("/text")
    page.get_by_text("The model is ready.").wait_for()
    page.get_by_role("button", name="Read").click()
    assert page.get_by_text("Type or paste a text first.").is_visible()
    page.locator("#words").fill("a" * 1_100_000)
    page.keyboard.press("Control+Enter")
    page.get_by_text("That is longer than 1,048,576 bytes.").wait_for()
    faults.expect("413")


@pytest.mark.parametrize("policy", [True, False])
def test_markup_stays_text(visit: Open, policy: bool) -> None:
    page = read(visit("/text", bypass_csp=not policy), HOSTILE)
    page.get_by_role("button", name="Token by token").click()
    assert page.evaluate("window.ran") is None
    # Rows out of sight are not laid out, and have no inner text then.
    assert "<img" in (page.locator("#rows").text_content() or "")
    page.get_by_role("button", name="Text", exact=True).click()
    assert "onerror=" in page.locator("#tokens").inner_text()
    assert page.locator("main img, main script").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("rows", [False, True])
def test_it_can_be_read(visit: Open, scheme: str, rows: bool) -> None:
    page = read(visit("/text?latent=1", color_scheme=scheme), " ".join(f"word{i}" for i in range(40)))
    if rows:
        page.get_by_role("button", name="Token by token").click()
    else:
        page.evaluate(
            "document.querySelectorAll('[role=option]').forEach((e, i) => (e.className = `s${1 + (i % 20)}`))"
        )
    assert faults_of(page, "pale") == []
    assert faults_of(page, "structure") == []


def test_a_phone_has_one_column(visit: Open) -> None:
    page = read(visit("/text", **PHONE), " ".join(f"word{i}" for i in range(40)) + " " + "x" * 300)
    assert faults_of(page, "wide") == []
    page.get_by_role("button", name="Token by token").click()
    assert faults_of(page, "wide") == []
