"""A run on images in a browser: patches lie over the picture where the latent fires, and what is gone says so."""

import base64
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from browsing import Open
from latents_db import make_db

from saefast.latents.database import LatentsDB

pytestmark = pytest.mark.browser

CHECKS = Path(__file__).with_name("page_checks.js").read_text(encoding="utf-8")
GRID = {"rows": 5, "columns": 5, "first": 5}
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
# Of one pixel, grey.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mM4ceLEfwAIMANnT/1wbQAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequences of 30 positions, of which the first five stand before the patches; the image of the first is gone."""
    folder = tmp_path_factory.mktemp("run")
    path = make_db(folder, kind="images", unit="patches", grid=GRID,
                   images={"shown": 11, "missing": 1, "whole": False, "why": None})  # fmt: skip
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE latents SET title = ''")
        db.execute("UPDATE sequences SET name = 'photos/' || sequence || '<b>.png'")
        db.executemany("INSERT INTO images VALUES (?, 'image/png', ?)", [(sequence, PNG) for sequence in range(1, 12)])
    return folder


def faults_of(page: Any, what: str) -> list[str]:
    found: list[str] = page.evaluate(f"{CHECKS}.{what}()")
    return found


def opened(visit: Open, path: str, **settings: Any) -> Any:
    page = visit(path, **settings)
    page.wait_for_load_state("networkidle")
    return page


def test_patches_lie_where_the_latent_fires(visit: Open, run_folder: Path) -> None:
    db = LatentsDB(run_folder / "latents.db")
    page = opened(visit, "/latent/5")
    items = page.locator(".pictures li").all()
    examples = db.examples(5)
    assert len(items) == len(examples) > 3
    checked = 0
    for item, example in zip(items, examples, strict=True):
        sequence = example.context.sequence
        assert item.locator(".name").inner_text() == f"photos/{sequence}<b>.png"
        assert item.locator("img").count() == (1 if sequence else 0)
        if not sequence:
            assert "The file is gone" in item.inner_text()
            continue
        item.scroll_into_view_if_needed()
        whole = item.locator(".picture").bounding_box()
        fires = [p + example.context.start - GRID["first"] for p in example.acts.nonzero()[0].tolist()]
        expected = sorted(divmod(place, 5) for place in fires if 0 <= place < 25)
        found = []
        for patch in item.locator("rect.patch").all():
            box = patch.bounding_box()
            found.append((round((box["y"] - whole["y"]) / whole["height"] * 5),
                          round((box["x"] - whole["x"]) / whole["width"] * 5)))  # fmt: skip
            assert "of its largest" in patch.locator("title").text_content()
        assert sorted(found) == expected
        checked += len(found)
    assert checked


def test_shading_is_switched_off(visit: Open) -> None:
    page = opened(visit, "/latent/5")
    patches = page.locator("svg.patches").first
    assert patches.is_visible()
    page.get_by_label("Shade patches").uncheck()
    assert not patches.is_visible()


def test_the_table_shows_images_in_place_of_tokens(visit: Open) -> None:
    page = opened(visit, "/?sort=latent")
    shown = page.locator("tbody .strip").first.locator("img")
    assert 0 < shown.count() <= 4
    assert shown.first.evaluate("image => image.complete && image.naturalWidth") == 1
    assert "no tokens" not in page.locator("tbody tr").nth(1).inner_text()


def test_text_is_not_asked_for(visit: Open) -> None:
    page = opened(visit, "/text")
    assert "The rows of this run are of images, not of text" in page.locator("h1").inner_text()


@pytest.mark.parametrize("path", ["/latent/5", "/"])
def test_pages_of_images_fit_a_phone(visit: Open, path: str) -> None:
    assert faults_of(opened(visit, path, **PHONE), "wide") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_latent_of_images_can_be_read(visit: Open, scheme: str) -> None:
    page = opened(visit, "/latent/5", color_scheme=scheme)
    assert faults_of(page, "pale") == []
    assert faults_of(page, "structure") == []
