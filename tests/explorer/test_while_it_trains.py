"""Two processes at once: one trains a run, the other explores it, and neither minds the other."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browsing import Faults, pages
from hanging import HANG, wait_until

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parent.parent.parent
# Trains to step 20 of 40, and from there on once the file `go` is there.
PROGRAM = """
import sys
from pathlib import Path
from hanging import wait_until
from train_job import CONFIG, SAE, TrainConfig, rows, train

run, go = map(Path, sys.argv[1:])

def on_log(line):
    if line["step"] == 20:
        wait_until(go.exists, "the word to go on")

train(rows(), SAE, TrainConfig(**CONFIG), run, on_log=on_log)
"""


@contextmanager
def child(*command: str) -> Iterator[subprocess.Popen[str]]:
    path = {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | path
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_run_is_watched_while_it_trains_and_once_it_has_ended(tmp_path: Path, browser: Any, faults: Faults) -> None:
    from playwright.sync_api import expect

    run, go = tmp_path / "run", tmp_path / "go"
    run.mkdir()
    with ExitStack() as stack:
        trains = stack.enter_context(child("-c", PROGRAM, str(run), str(go)))
        metrics = run / "metrics.jsonl"
        wait_until(lambda: metrics.exists() or trains.poll() is not None, "the first figures")
        explores = stack.enter_context(child("-m", "saefast", "explore", str(run), "--no-browser", "--port", "0"))
        assert explores.stdout is not None
        address = next(found[0] for line in explores.stdout if (found := re.search(r"http://\S+", line)))
        parts = urlsplit(address)
        open_page = stack.enter_context(pages(browser, f"http://{parts.netloc}", faults))
        page = open_page(f"/?{parts.query}")
        assert urlsplit(page.url).path == "/training"
        expect(page.locator("#how-far")).to_contain_text("step 20 of 40")
        expect(page.locator("#is")).to_have_text("live")
        assert page.locator("nav").inner_text() == "training"
        go.touch()
        assert trains.wait(HANG) == 0
        expect(page.locator("#is")).to_have_text("finished")
        expect(page.locator("#how-far")).to_contain_text("step 40 of 40")
        assert page.locator("#charts svg").count() > 3
