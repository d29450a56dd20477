"""What every view of the page is given: the run, its latents.db, and how a page is made of a template."""

import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from saefast.latents import numbers
from saefast.latents.database import Latent, LatentsDB
from saefast.latents.schema import LATENTS_DB
from saefast.readable import visible

FOLDER = Path(__file__).resolve().parent
DEFAULT_PORT = 8765
# As `visible` shows it.
LINE_END = visible("\n")


class View(NamedTuple):
    """A part of the page. path: where it begins; needs_latents: whether it shows nothing without latents.db."""

    name: str
    path: str
    needs_latents: bool


# In the order of the navigation. `latent` is reached from the others.
VIEWS = (
    View("latents", "/", True),
    View("text", "/text", True),
    View("map", "/map", True),
    View("training", "/training", False),
    View("compare", "/compare", True),
)


def templates() -> jinja2.Environment:
    """Everything that comes from the data is escaped; a name that a template misspells is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER / "templates", encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= numbers.FILTERS | {"visible": visible, "quiet_ends": quiet_ends}
    return environment


def quiet_ends(text: str) -> Markup:
    """Text, escaped, whose signs for line ends stand back."""
    return escape(text).replace(LINE_END, Markup("<i>{}</i>").format(LINE_END))


@dataclass
class Explorer:
    """A run that is shown.

    Attributes:
        run: its folder. other: of a second run, to compare with.
        latents: its latents.db, None where there is none yet; views that need it read `db`.
        why: why there is none, in a sentence.
        model, data: where the model that was harvested and the harvest are, where the run's config leads to neither.
        port: where the page is served. token: what opens it. ticket: what opens it once; a browser that is started
            is given this, for its command line can be read by others on the machine.
        form_key: what a form that writes sends along.
    """

    run: Path
    latents: LatentsDB | None = None
    other: Path | None = None
    why: str = ""
    model: str | None = None
    data: str | None = None
    port: int = DEFAULT_PORT
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    ticket: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    form_key: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    templates: jinja2.Environment = field(default_factory=templates)

    @classmethod
    def of_run(cls, run: str | Path, other: str | Path | None = None, port: int = DEFAULT_PORT) -> "Explorer":
        """Opens the latents.db of a run's folder.

        Raises:
            InputError: it is missing, damaged or of another version.
        """
        run = Path(run)
        return cls(run, LatentsDB(run / LATENTS_DB), None if other is None else Path(other), port=port)

    @property
    def db(self) -> LatentsDB:
        """Raises HTTPException (404) where there is no latents.db yet."""
        if self.latents is None:
            raise HTTPException(404, self.why or f"{self.run} has no {LATENTS_DB} yet")
        return self.latents

    def latent(self, latent: int) -> Latent:
        """Raises HTTPException (404) for one that is not there."""
        if not 0 <= latent < self.db.n_latents:
            raise HTTPException(404, f"There is no latent {latent}: expected 0 to {self.db.n_latents - 1:,}.")
        return self.db.latent(latent)

    def page(self, request: Request, template: str, status: int = 200, **values: Any) -> Response:
        """A template, filled. `request`, `explorer`, `views`, `meta` and `status` are there for every one."""
        views = [view for view in VIEWS if self.latents is not None or not view.needs_latents]
        meta = self.latents.meta if self.latents is not None else {}
        shared = {"request": request, "explorer": self, "views": views, "meta": meta, "status": status}
        return HTMLResponse(self.templates.get_template(template).render(shared | values), status)

    def address(self, token: str) -> str:
        """What a browser opens."""
        return f"http://127.0.0.1:{self.port}/?token={token}"


def as_json(value: Any, status: int = 200) -> JSONResponse:
    """JSON for a script of ours. Raises ValueError for NaN, which no browser reads."""
    json.dumps(value, allow_nan=False)
    return JSONResponse(value, status)
