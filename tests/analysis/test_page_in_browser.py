"""Pages that need no server, opened from the disk in a real browser: searched, walked, attacked by their own texts."""

from pathlib import Path
from typing import Any

import pytest
from browsing import Faults, pages
from latents_db import make_db
from odd_latents import HOSTILE, attack

from saefast.analysis.page import shown, write_features, write_page
from saefast.latents.database import LatentsDB

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of harmless latents in page/, of hostile ones in bad/, and a page of a few of each."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("page", "bad"):
        (folder / f"{name}-run").mkdir()
        path = make_db(folder / f"{name}-run", n_latents=60, n_sequences=30)
        if name == "bad":
            attack(path)
        db = LatentsDB(path)
        write_page(db, folder / name, range(60), HOSTILE if name == "bad" else "")
        write_features(
            folder / f"{name}-run", db, [shown(db, latent) for latent in db.latents(range(1, 20))], "A title"
        )
    return folder


@pytest.mark.parametrize("policy", [True, False])
@pytest.mark.parametrize("path", ["bad/index.html", "bad/latents/2.html", "bad-run/features.html"])
def test_texts_stay_texts(browser: Any, folder: Path, faults: Faults, path: str, policy: bool) -> None:
    with pages(browser, f"file://{folder}", faults, bypass_csp=not policy) as visit:
        page = visit(f"/{path}")
        assert HOSTILE.partition("</title>")[0] in page.locator("main").inner_text()
        assert page.locator("main script, main style, b[onclick], img").count() == 0


def test_the_index_is_searched_and_walked(browser: Any, folder: Path, faults: Faults) -> None:
    with pages(browser, f"file://{folder}", faults) as visit:
        page = visit("/page/index.html")
        titles = {
            str(i): title
            for i, title in LatentsDB(folder / "page-run" / "latents.db").query("SELECT latent, title FROM latents")
        }
        visible = page.locator(".row:visible")
        assert visible.count() == 60
        page.keyboard.press("/")
        page.keyboard.type("Bridge")
        found = [i for i, title in titles.items() if "bridge" in title]
        assert 0 < len(found) < 60
        assert page.locator(".row:visible td:first-child").all_inner_texts() == found
        assert page.locator("#found").inner_text() == f"{len(found)} found"
        page.keyboard.press("Escape")
        page.keyboard.press("j")
        page.keyboard.press("j")
        page.keyboard.press("k")
        page.keyboard.press("Enter")
        page.wait_for_url(f"**/latents/{found[0]}.html")
        assert f"latent {found[0]}" in page.locator("h1").inner_text()
        page.keyboard.press("j")
        assert page.evaluate("document.activeElement.className") == "context"
        page.locator("[rel=next]").click()
        page.wait_for_url(f"**/latents/{int(found[0]) + 1}.html")
        page.keyboard.press("ArrowLeft")
        page.wait_for_url(f"**/latents/{found[0]}.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(
    "path", ["page/index.html", "page/latents/5.html", "page-run/features.html", "bad/latents/2.html"]
)
def test_pages_fit_their_width(browser: Any, folder: Path, faults: Faults, path: str, width: int, scheme: str) -> None:
    settings = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    with pages(browser, f"file://{folder}", faults, **settings) as visit:
        page = visit(f"/{path}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(int(part) for part in colour.strip("rgb()").split(",")) < 100) == (scheme == "dark")
        shade = page.locator(".text span[title]").first
        if shade.count():
            assert shade.evaluate("element => getComputedStyle(element).backgroundColor").startswith("rgba(")
