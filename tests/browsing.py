"""A real browser for tests: the system's Chromium, an app served to it, and pages on which nothing may go wrong."""

import importlib.util
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hanging import HANG, wait_until

# Milliseconds that a page is waited for: hundreds of times what one takes, and what is not there then is not coming.
WAIT = 1000 * HANG / 30
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# SAEFAST_BROWSER=1 insists on a browser: tests that need one fail where there is none. Unset, they are left out.
INSIST = "SAEFAST_BROWSER"
ARGUMENTS = (
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    # Colours are compared, so they do not depend on a display.
    "--force-color-profile=srgb",
    # No name is looked up: what a page tries to load from elsewhere fails, and that is seen.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


def executable() -> str | None:
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


def missing() -> str | None:
    """What a test in a browser needs and this machine has not; None where all is there."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed (make env)"
    if executable() is None:
        return "there is no Chromium (apt-get install chromium)"
    return None


def insisted() -> bool:
    return os.environ.get(INSIST) == "1"


@contextmanager
def launched() -> Iterator[Any]:
    """A headless browser; playwright's Browser. Raises AssertionError where there is none."""
    assert missing() is None, missing()
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=WAIT)
    # Chromium has no sandbox for root.
    sandbox = [] if os.getuid() else ["--no-sandbox"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=[*ARGUMENTS, *sandbox])
        yield browser
        browser.close()


@contextmanager
def served(make_app: Callable[[int], Any]) -> Iterator[str]:
    """Serves an ASGI app, made for its port, from a thread: the address, "http://127.0.0.1:PORT"."""
    import uvicorn

    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(make_app(port), log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        wait_until(lambda: server.started or not thread.is_alive(), "the server")
        assert thread.is_alive(), "the server ended at once"
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def explored(run: Path, other: Path | None = None) -> Iterator[tuple[Any, str]]:
    """Serves the explorer of a run's folder: the Explorer, and the address."""
    from saefast.explorer.app import make_app
    from saefast.explorer.state import Explorer

    explorer = Explorer.of_run(run, other)

    def app(port: int) -> Any:
        explorer.port = port
        return make_app(explorer)

    with served(app) as address:
        yield explorer, address


class Faults(list[str]):
    """What went wrong on pages: errors and warnings of the console, exceptions, dialogs, requests to anywhere else."""

    def watch(self, context: Any, address: str) -> None:
        """Of all pages of a browser context, from now on. address: where requests may go."""
        context.on("console", self._console)
        context.on("weberror", lambda error: self.append(f"exception: {error.error}"))
        context.on("dialog", self._dialog)
        context.on("request", lambda request: self._request(request.url, address))
        context.on("requestfailed", self._failed)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.append(f"{message.type}: {message.text} ({message.location.get('url')})")

    def _dialog(self, dialog: Any) -> None:
        self.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, url: str, address: str) -> None:
        if not url.startswith((f"{address}/", "data:", "blob:", "about:")):
            self.append(f"request to elsewhere: {url}")

    def _failed(self, request: Any) -> None:
        # A page that is left takes back what it has asked for.
        if "ERR_ABORTED" not in (request.failure or ""):
            self.append(f"failed: {request.url}: {request.failure}")

    def expect(self, part: str) -> None:
        """Takes away faults that a test has brought about; there must be some."""
        kept = [fault for fault in self if part not in fault]
        assert len(kept) < len(self), f"expected a fault with {part!r}, found {self}"
        self[:] = kept


Open = Callable[..., Any]


@contextmanager
def pages(browser: Any, address: str, faults: Faults, token: str = "", **settings: Any) -> Iterator[Open]:
    """A function that opens a page on a path of the app; settings: of playwright's new_context (viewport, …)."""
    with browser.new_context(**settings) as context:
        context.set_default_timeout(WAIT)
        faults.watch(context, address)

        def open_page(path: str = "/") -> Any:
            page = context.new_page()
            page.goto(address + path + (f"{'&' if '?' in path else '?'}token={token}" if token else ""))
            return page

        yield open_page
        for page in context.pages:
            page.evaluate("0")  # what the page has said until now arrives before this does
