"""The page as one ASGI app: the routes of every view, static files, and errors in plain words."""

from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from saefast.errors import InputError
from saefast.explorer import browse, compare, images, latent, map, text, training
from saefast.explorer.guard import Guard
from saefast.explorer.state import FOLDER, Explorer, as_json

VIEWS = (browse, latent, images, text, map, training, compare)


def make_app(explorer: Explorer) -> ASGIApp:
    """What uvicorn serves."""
    routes: list[BaseRoute] = [Mount("/static", StaticFiles(directory=FOLDER / "static"), name="static")]
    if explorer.latents is None:
        routes.append(Route("/", lambda request: RedirectResponse("/training")))
    for view in VIEWS:
        routes.extend(view.routes(explorer))

    def failed(request: Request, error: Exception) -> Response:
        return _in_words(explorer, request, error)

    app = Starlette(routes=routes, exception_handlers={HTTPException: failed, InputError: failed, Exception: failed})
    return Guard(app, explorer.token, explorer.port, explorer.ticket)


def _in_words(explorer: Explorer, request: Request, error: Exception) -> Response:
    """An error as a page, or as JSON for a script that asked for it."""
    status, words, headers = 500, "Something went wrong here; the terminal says what.", None
    if isinstance(error, HTTPException):
        status, words, headers = error.status_code, error.detail, error.headers
        if words == HTTPStatus(status).phrase:
            words = {404: "There is no such page.", 405: "That cannot be done at this address."}.get(status, words)
    elif isinstance(error, InputError):
        status, words = 400, str(error)
    if "application/json" in request.headers.get("accept", ""):
        answer: Response = as_json({"error": words}, status)
    else:
        answer = explorer.page(request, "error.html", status, words=words)
    answer.headers.update(headers or {})
    return answer
