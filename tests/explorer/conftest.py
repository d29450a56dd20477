"""The explorer in a browser: one is started for each file, and what goes wrong on a page fails its test.

A file that shows another run than the made-up one has a fixture `run_folder` of its own.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from browsing import Faults, Open, launched, pages, served
from latents_db import make_db


# For a file and no longer: while playwright is open, no other test in its process may run an event loop.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found


@pytest.fixture
def faults() -> Iterator[Faults]:
    """What goes wrong on pages that are opened with it fails the test in the end."""
    found = Faults()
    yield found
    assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a latents.db of 130 latents, more than a page of them."""
    folder = tmp_path_factory.mktemp("run")
    make_db(folder, 130, n_sequences=30)
    return folder


@pytest.fixture(scope="module")
def shown(run_folder: Path) -> Iterator[tuple[Any, str]]:
    """The Explorer of the run, served, and its address."""
    from saefast.explorer.app import make_app
    from saefast.explorer.state import Explorer

    explorer = Explorer.of_run(run_folder)

    def app(port: int) -> Any:
        explorer.port = port
        return make_app(explorer)

    with served(app) as address:
        yield explorer, address


@pytest.fixture
def visit(browser: Any, shown: tuple[Any, str], faults: Faults) -> Iterator[Open]:
    """visit("/latent/3", viewport=…): a page of the explorer; settings are those of playwright's new_context."""
    explorer, address = shown
    with ExitStack() as opened:

        def visit(path: str = "/", **settings: Any) -> Any:
            context = pages(browser, address, faults, explorer.token, **settings)
            return opened.enter_context(context)(path)

        yield visit
