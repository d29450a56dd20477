"""Nobody sees the page without the token, and nothing but a page of ours writes: see saefast/explorer/guard.py."""

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("starlette")
from explorer_client import HOME, client, explorer_of, stranger
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from saefast.explorer.app import make_app
from saefast.explorer.guard import FORM_KEY, HEADERS, LONGEST_BODY, Guard, form
from saefast.explorer.state import Explorer

PATHS = ("/", "/static/base.css", "/nothing", "/training", "/latent/1")


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    return explorer_of(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_shown_without_the_token(explorer: Explorer, path: str) -> None:
    answer = stranger(explorer).get(path)
    assert answer.status_code == 403
    assert "saefast explore printed" in answer.text
    assert explorer.token not in answer.text


@pytest.mark.parametrize("given", ["", "wrong", "é", "x" * 10_000])
def test_a_wrong_token_opens_nothing(explorer: Explorer, given: str) -> None:
    answer = stranger(explorer).get("/", params={"token": given})
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers
    visitor = stranger(explorer)
    assert visitor.get("/", headers={"Cookie": f"saefast-8765={given}".encode()}).status_code == 403


def test_two_tokens_are_no_token(explorer: Explorer) -> None:
    answer = stranger(explorer).get("/", params={"token": [explorer.token, "other"]})
    assert answer.status_code == 403


def test_the_token_becomes_a_cookie_and_leaves_the_address(explorer: Explorer) -> None:
    visitor = stranger(explorer)
    answer = visitor.get("/static/base.css", params={"token": explorer.token, "sort": "ä&b"})
    assert answer.status_code == 303
    assert answer.headers["location"] == "/static/base.css?sort=%C3%A4%26b"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert visitor.get("/static/base.css").status_code == 200


def test_a_terminal_in_a_browser_opens_the_page_too(explorer: Explorer) -> None:
    """Where another site began, a browser keeps the new cookie from the redirected request."""
    answer = stranger(explorer).get("/", params={"token": explorer.token}, headers={"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 200
    assert answer.headers["refresh"] == "0; url=/"
    assert explorer.token in answer.headers["set-cookie"]
    assert explorer.token not in answer.text


@pytest.mark.parametrize("path", ["//elsewhere.example/", "/\\elsewhere.example/"])
def test_the_token_leads_to_no_other_site(explorer: Explorer, path: str) -> None:
    answer = _raw(explorer, path, f"token={explorer.token}")
    assert answer["location"].startswith("/elsewhere.example")


def _raw(explorer: Explorer, path: str, query: str) -> dict[str, str]:
    """Headers of the answer to a path as it is, which an HTTP client would tidy up."""
    sent: list[dict] = []
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "query_string": query.encode(),
        "headers": [(b"host", HOME.removeprefix("http://").encode())],
    }

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(make_app(explorer)(scope, receive, send))
    return {name.decode(): value.decode() for name, value in sent[0]["headers"]}


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1", "localhost:1", "127.0.0.1:8765.x", ""]
)
def test_a_name_that_points_here_is_refused(explorer: Explorer, host: str) -> None:
    visitor = client(explorer)
    answer = visitor.get("/static/base.css", headers={"Host": host})
    assert answer.status_code == 421
    assert visitor.get("/static/base.css").status_code == 200
    assert visitor.get("/", params={"token": explorer.token}, headers={"Host": host}).status_code == 421


def test_localhost_is_this_machine(explorer: Explorer) -> None:
    assert client(explorer).get("/static/base.css", headers={"Host": "localhost:8765"}).status_code in (200, 403)
    answer = stranger(explorer).get("/", params={"token": explorer.token}, headers={"Host": "localhost:8765"})
    assert answer.status_code == 303


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND"])
def test_no_other_method_is_known(explorer: Explorer, method: str) -> None:
    assert client(explorer).request(method, "/static/base.css").status_code == 405


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_says_what_a_browser_may_do(explorer: Explorer, path: str) -> None:
    for visitor in (client(explorer), stranger(explorer)):
        headers = visitor.get(path).headers
        assert {name: headers.get(name) for name in HEADERS} == HEADERS
        assert headers["cache-control"] == "private, no-cache"
    policy = HEADERS["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'")


def test_an_error_inside_says_so_in_words_and_with_the_same_headers(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a secret")

    visitor = stranger(explorer, raise_server_exceptions=False)
    visitor.get("/", params={"token": explorer.token})
    monkeypatch.setattr("starlette.staticfiles.StaticFiles.get_response", broken)
    answer = visitor.get("/static/base.css")
    assert answer.status_code == 500
    assert "Something went wrong" in answer.text
    assert "secret" not in answer.text
    assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS


def test_what_is_not_there_is_a_page_in_words(explorer: Explorer) -> None:
    visitor = client(explorer)
    answer = visitor.get("/nothing")
    assert answer.status_code == 404
    assert "There is no such page." in answer.text
    for path in ("/static/../state.py", "/static/%2e%2e/state.py", "/static//etc/passwd", "/static/"):
        assert visitor.get(path).status_code == 404
    asked = visitor.get("/nothing", headers={"Accept": "application/json"})
    assert (asked.status_code, asked.json()) == (404, {"error": "There is no such page."})


# What a POST may do is asked of a small app behind the same guard.


async def _write(request: Request) -> JSONResponse:
    return JSONResponse(await form(request, "the form's key"))


@pytest.fixture
def writer() -> TestClient:
    app = Guard(Starlette(routes=[Route("/label", _write, methods=["POST"])]), "the-token", 8765)
    visitor = TestClient(app, base_url=HOME)
    visitor.cookies.set("saefast-8765", "the-token")
    return visitor


OURS = {"Origin": HOME}


def test_a_form_of_ours_writes(writer: TestClient) -> None:
    body = {"text": "a bridge & <b>", FORM_KEY: "the form's key"}
    assert writer.post("/label", data=body, headers=OURS).json() == {"text": "a bridge & <b>"}
    headers = OURS | {"X-Saefast-Key": "the form's key", "Sec-Fetch-Site": "same-origin"}
    assert writer.post("/label", data={"text": ""}, headers=headers).json() == {"text": ""}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "null"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:9000"},
        {"Origin": "https://127.0.0.1:8765"},
        {"Origin": "http://localhost:8765"},
        OURS | {"Sec-Fetch-Site": "cross-site"},
        OURS | {"Sec-Fetch-Site": "same-site"},
        OURS | {"Sec-Fetch-Site": "none"},
    ],
)
def test_no_other_site_writes(writer: TestClient, headers: dict[str, str]) -> None:
    answer = writer.post("/label", data={"text": "x", FORM_KEY: "the form's key"}, headers=headers)
    assert answer.status_code == 403


@pytest.mark.parametrize("key", [None, "", "wrong", "é"])
def test_a_form_without_the_key_writes_nothing(writer: TestClient, key: str | None) -> None:
    body = {"text": "x"} | ({} if key is None else {FORM_KEY: key})
    assert writer.post("/label", data=body, headers=OURS).status_code == 403


def test_a_post_needs_the_cookie_and_no_address_replaces_it(writer: TestClient) -> None:
    writer.cookies.clear()
    body = {"text": "x", FORM_KEY: "the form's key"}
    assert writer.post("/label", data=body, headers=OURS).status_code == 403
    assert writer.post("/label?token=the-token", data=body, headers=OURS).status_code == 403


def test_a_form_that_cannot_be_read_is_refused(writer: TestClient) -> None:
    headers = OURS | {"X-Saefast-Key": "the form's key"}
    assert writer.post("/label", content=b"text=\xff", headers=headers).status_code == 400
    assert writer.post("/label", content=b"a=1&" * 200, headers=headers).status_code == 400
    assert writer.post("/label", content=b"x" * (LONGEST_BODY + 1), headers=headers).status_code == 413


def test_two_explorers_keep_their_cookies_apart(tmp_path: Path, explorer: Explorer) -> None:
    other = Explorer(tmp_path, port=9999)
    visitor = TestClient(make_app(other), base_url="http://127.0.0.1:9999", follow_redirects=False)
    first = stranger(explorer).get("/", params={"token": explorer.token}).headers["set-cookie"].split("=")[0]
    second = visitor.get("/", params={"token": other.token}).headers["set-cookie"].split("=")[0]
    assert first != second
