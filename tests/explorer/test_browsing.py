"""The harness itself: what goes wrong on a page is seen, whatever it is, and a page on which nothing does passes."""

from collections.abc import Iterator
from typing import Any

import pytest
from browsing import Faults, pages, served

pytestmark = pytest.mark.browser

POLICY = {"Content-Security-Policy": "default-src 'self'"}
PAGE = "<!doctype html><html lang=en><title>t</title><link rel=icon href=data:,><h1>in order</h1>"
BODIES = {
    "/": "",
    "/console": "<script>console.error('from a script')</script>",
    "/exception": "<script>throw new Error('thrown')</script>",
    "/dialog": "<script>alert('asked')</script>",
    "/missing": "<img src=/nowhere.png>",
    "/elsewhere": "<img src=https://example.com/x.png>",
    "/unresolved": "<img src=http://localhost:1/x.png>",
}


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    def answer(request: Request) -> HTMLResponse:
        return HTMLResponse(PAGE + BODIES[request.url.path], headers=POLICY if "policy" in request.query_params else {})

    with served(lambda _port: Starlette(routes=[Route(path, answer) for path in BODIES])) as found:
        yield found


def test_a_page_in_order_has_no_faults(browser: Any, site: str, faults: Faults) -> None:
    with pages(browser, site, faults) as open_page:
        assert open_page().locator("h1").inner_text() == "in order"


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("/console", "error: from a script"),
        ("/console?policy", "Content Security Policy"),
        ("/exception", "exception: thrown"),
        ("/dialog", "dialog: asked"),
        ("/missing", "404"),
        ("/elsewhere", "request to elsewhere: https://example.com/x.png"),
        ("/unresolved", "failed: http://localhost:1/x.png"),
    ],
)
def test_what_goes_wrong_is_seen(browser: Any, site: str, path: str, seen: str) -> None:
    faults = Faults()
    with pages(browser, site, faults) as open_page:
        open_page(path).wait_for_load_state()
    assert any(seen in fault for fault in faults), faults
    faults.expect(seen)
    with pytest.raises(AssertionError, match="expected a fault"):
        faults.expect("what did not happen")
