"""A browser of the explorer in one process: `client` opens the page as the printed address does."""

from pathlib import Path

import pytest
from latents_db import make_db

pytest.importorskip("starlette")
from starlette.testclient import TestClient

from saefast.explorer.app import make_app
from saefast.explorer.state import Explorer

HOME = "http://127.0.0.1:8765"


def explorer_of(folder: Path, n_latents: int = 40, **facts: object) -> Explorer:
    """An explorer of a made-up run; facts: as make_db takes them."""
    make_db(folder, n_latents, **facts)  # type: ignore[arg-type]
    return Explorer.of_run(folder)


def stranger(explorer: Explorer, **options: bool) -> TestClient:
    """A client that has never had the token."""
    return TestClient(make_app(explorer), base_url=HOME, follow_redirects=False, **options)  # type: ignore[arg-type]


def client(explorer: Explorer) -> TestClient:
    """A client with the cookie; an error inside the app is raised in the test."""
    opened = stranger(explorer)
    answer = opened.get("/", params={"token": explorer.token})
    assert answer.status_code == 303, answer.text
    return opened


def page(visitor: TestClient, address: str) -> str:
    """A page that has to be there."""
    answer = visitor.get(address)
    assert answer.status_code == 200, answer.text
    return answer.text


def from_our_page(explorer: Explorer) -> dict[str, str]:
    """Headers of a POST by a script of ours."""
    return {"Origin": HOME, "X-Saefast-Key": explorer.form_key, "Accept": "application/json"}
