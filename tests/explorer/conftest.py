"""The explorer in a browser: one is started for each file, and what goes wrong on a page fails its test.

A file that shows another run than the made-up one has a fixture `run_folder` of its own.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from browsing import Faults, Open, explored, pages
from made_up_run import make_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 130 latents, more than a page of them."""
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def shown(run_folder: Path) -> Iterator[tuple[Any, str]]:
    """The Explorer of the run, served, and its address."""
    with explored(run_folder) as found:
        yield found


@pytest.fixture
def visit(browser: Any, shown: tuple[Any, str], faults: Faults) -> Iterator[Open]:
    """visit("/latent/3", viewport=…): a page of the explorer; settings are those of playwright's new_context."""
    explorer, address = shown
    with ExitStack() as opened:

        def visit(path: str = "/", **settings: Any) -> Any:
            context = pages(browser, address, faults, explorer.token, **settings)
            return opened.enter_context(context)(path)

        yield visit
