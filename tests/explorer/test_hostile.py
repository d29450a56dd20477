"""Data that attacks whoever looks at it: every text is a script in some disguise, and none of them runs."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from browsing import Faults, Open
from made_up_run import make_run

from saefast.latents.database import LatentsDB
from saefast.latents.schema import LATENTS_DB

pytestmark = pytest.mark.browser

PAGES = ("/", "/?q=onerror", "/latent/2", "/training", "/map", "/compare", "/text")
# Of these, texts of the data are on every page.
FULL = ("/", "/?q=onerror", "/latent/2")

# Whatever of these is not escaped runs, writes into `ran`, or asks for something that is not there.
RUN = "window.ran=1;alert(1)"
HOSTILE = (
    f'<img src=x onerror="{RUN}">',
    f"</script><script>{RUN}</script>",
    f'"><svg onload="{RUN}">',
    f"'><input autofocus onfocus='{RUN}'>",
    f"javascript:{RUN}",
    f"'-{RUN}-'",
    '"}]};alert(1)//',
    "{{ 7 * 7 }}{% raise %}",
    "</style><style>*{display:none!important}</style>",
    "</title></textarea><script src=//example.com/x.js></script>",
    "\u202e\u0000\u2028\ufeff\\u003cscript\\u003e",
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which every text is an attack, its folder's name included."""
    folder = tmp_path_factory.mktemp("runs") / HOSTILE[0].replace("/", "")
    folder.mkdir()
    facts: dict[str, Any] = {
        "sae": {"digest": "", "architecture": "topk", "d_in": 16, "k": 4, "hook": HOSTILE[2], "model": HOSTILE[1]},
        "rows": {"source": HOSTILE[0], "data": HOSTILE[1], "rows": 360},
        "score": HOSTILE[2],
        "logits": {"what": "embedding", "why": HOSTILE[0]},
        "clusters": list(HOSTILE[:3]),
        "map": {"method": HOSTILE[0]},
    }
    path = make_run(folder, 40, 12, **facts) / LATENTS_DB
    with closing(sqlite3.connect(path)) as db, db:
        hostile(db)
    latents = LatentsDB(path)
    for latent, text in enumerate(HOSTILE, start=1):
        latents.write_label(latent, text)
    return folder


def hostile(db: sqlite3.Connection) -> None:
    """Attacks in place of the texts of a latents.db."""

    def attack(number: int) -> str:
        return HOSTILE[number % len(HOSTILE)]

    db.create_function("attack", 1, attack, deterministic=True)
    db.execute("UPDATE tokens SET text = attack(token)")
    db.execute("UPDATE latents SET title = attack(latent)")
    db.execute("UPDATE sequences SET name = attack(sequence)")
    for number, start, stop in db.execute("SELECT context, start, stop FROM contexts").fetchall():
        pieces = [attack(number + place) for place in range(stop - start)]
        lengths = b"".join(len(piece).to_bytes(2, "little") for piece in pieces)
        db.execute("UPDATE contexts SET text = ?, lengths = ? WHERE context = ?", ("".join(pieces), lengths, number))
    for table in ("token_search", "context_search"):
        db.execute(f"INSERT INTO {table} ({table}) VALUES ('rebuild')")


@pytest.mark.parametrize("policy", [True, False])
@pytest.mark.parametrize("path", PAGES)
def test_texts_stay_texts(visit: Open, path: str, policy: bool) -> None:
    """With our policy, under which an attack would be reported, and without, under which it would succeed."""
    page = visit(path, bypass_csp=not policy)
    page.wait_for_load_state("networkidle")
    assert page.evaluate("window.ran") is None
    assert page.locator("a[href^='javascript:'], img[src=x], svg[onload], input[onfocus], main style").count() == 0
    assert page.locator("body").is_visible()
    if path in FULL:
        assert "<img src=x onerror=" in page.locator("main").inner_text()


def test_an_attack_that_is_not_escaped_is_seen(visit: Open, faults: Faults) -> None:
    page = visit("/training", bypass_csp=True)
    page.evaluate("html => document.body.insertAdjacentHTML('beforeend', html)", HOSTILE[0])
    page.wait_for_function("window.ran === 1")
    faults.expect("dialog: 1")
    faults.expect("404")
