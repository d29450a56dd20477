"""Who may see the page: whoever has the token that `saefast explore` printed, from this machine, and no other site.

The page shows texts of a data set and takes labels, so it is kept from other users of the machine and from web sites
that a browser has open. The token in the address becomes a cookie at once and leaves the address. A Host header that
is not ours is refused, which is what a name that was made to point at 127.0.0.1 sends (DNS rebinding). Nothing writes
but a POST, which has to come from a page of ours: by Origin, by Fetch Metadata where the browser sends it, and by a
key that only our pages hold.
"""

import hmac
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # With no-referrer a browser says "null" for the Origin of a form.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
CACHE = "private, no-cache"
FORM_KEY = "key"
# What a page's body may hold, in bytes.
LONGEST_BODY = 1 << 20

_CLOSED = "This page opens with the address that saefast explore printed: it ends with a token. Open that one."


class Guard:
    """An ASGI app that lets requests through to another one if they are allowed, and says on every answer what a
    browser may do with it.

    Args:
        app: what is guarded.
        token: what opens it. port: where it is served, as a Host header names it.
        ticket: what opens it once.
    """

    def __init__(self, app: ASGIApp, token: str, port: int, ticket: str = "") -> None:
        self.app, self.token, self.ticket = app, token, ticket
        names = ("127.0.0.1", "localhost")
        self.hosts = {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())
        # Cookies are shared by all ports of a machine: two explorers must not take each other's.
        self.cookie = f"saefast-{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        # Whatever is no page (a websocket) is closed by an answer without a body.
        answer = self._refusal(scope) if scope["type"] == "http" else Response(status_code=403)
        await (answer or self.app)(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that goes no further; None for one that may."""
        headers = Headers(scope=scope)
        if headers.get("host") not in self.hosts or len(headers.getlist("host")) != 1:
            return _refused(f"This is not {sorted(self.hosts)[0]}: open the address that saefast explore printed.", 421)
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return PlainTextResponse("Only GET and POST are known here.", 405, {"Allow": "GET, HEAD, POST"})
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if "token" in query and scope["method"] != "POST":
            welcome = self._is_token(query["token"]) or self._is_ticket(query["token"])
            return self._let_in(scope, headers) if welcome else _refused(_CLOSED)
        if not self._is_token([_cookie(headers, self.cookie)]):
            return _refused(_CLOSED)
        return _refused("Labels are written from this page alone.") if _foreign(scope, headers) else None

    def _is_token(self, given: list[str]) -> bool:
        return len(given) == 1 and hmac.compare_digest(given[0].encode(), self.token.encode())

    def _is_ticket(self, given: list[str]) -> bool:
        """Whether this is the ticket, which is used up by that."""
        good = bool(self.ticket) and len(given) == 1 and hmac.compare_digest(given[0].encode(), self.ticket.encode())
        if good:
            self.ticket = ""
        return good

    def _let_in(self, scope: Scope, headers: Headers) -> Response:
        """Leaves the cookie and leads to the address without the token."""
        rest = [(name, value) for name, value in parse_qsl(scope["query_string"].decode("latin-1")) if name != "token"]
        # One slash in front, for two begin the name of another site.
        where = "/" + scope["path"].lstrip("/\\") + (f"?{urlencode(rest)}" if rest else "")
        answer: Response = RedirectResponse(where, 303)
        if headers.get("sec-fetch-site") == "cross-site":
            # From a terminal in a browser: the cookie is not sent along where another site began, so that we begin.
            answer = HTMLResponse('<!doctype html><meta charset="utf-8"><title>saefast</title>')
            answer.headers["Refresh"] = f"0; url={RedirectResponse(where).headers['location']}"
        answer.set_cookie(self.cookie, self.token, httponly=True, samesite="strict", path="/")
        return answer


def _refused(words: str, status: int = 403) -> Response:
    return PlainTextResponse(words + "\n", status)


def _cookie(headers: Headers, name: str) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


def _foreign(scope: Scope, headers: Headers) -> bool:
    """Whether a request that may write comes from anywhere but a page of ours."""
    if scope["method"] != "POST":
        return False
    return headers.get("origin") != f"http://{headers['host']}" or headers.get("sec-fetch-site") not in (
        None,
        "same-origin",
    )


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(HEADERS)
            headers.setdefault("Cache-Control", CACHE)
        await send(message)

    return sending


async def form(request: Request, key: str, longest: int = LONGEST_BODY) -> dict[str, str]:
    """The fields of a form that was posted, once it has shown the key that our pages hold.

    Args:
        key: Explorer.form_key, sent as the field "key" or in the header X-Saefast-Key.
        longest: bytes that the body may have.

    Raises:
        HTTPException: 403 without the key, 413 for a body that is too long, 400 for one that is no form.
    """
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > longest:
            raise HTTPException(413, f"That is longer than {longest:,} bytes.")
    try:
        fields: dict[str, Any] = dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=100))
    except ValueError:
        raise HTTPException(400, "The form cannot be read.") from None
    given = request.headers.get("x-saefast-key") or fields.pop(FORM_KEY, "")
    if not hmac.compare_digest(given.encode(), key.encode()):
        raise HTTPException(403, "This page is from before saefast explore was started anew: reload it.")
    return fields
