"""*latent*: all that is known of one: its contexts, activations, tokens, logit weights, relatives, and its label."""

import math
import shlex
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from saefast.explorer.guard import form
from saefast.explorer.listing import ROWS, SORTS, Around, Listing, whole
from saefast.explorer.shading import Run, shaded, shares
from saefast.explorer.state import Explorer, as_json
from saefast.latents.database import LONGEST_LABEL, Context, Example, Latent, LatentsDB, acts_in
from saefast.latents.numbers import act
from saefast.latents.schema import INTERVALS

# The histogram's drawing, in units of its own.
WIDTH, HEIGHT = 300, 96


class Shown(NamedTuple):
    """An example as the page shows it. before, after: the contexts beside it, where they are asked for."""

    example: Example
    runs: list[Run]
    before: list[Run]
    after: list[Run]


class Part(NamedTuple):
    """Examples drawn from one interval of activation. about: which; share: of all firings, None for the strongest."""

    about: str
    share: float | None
    shown: list[Shown]


class Bar(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    title: str


class Label(NamedTuple):
    """What a person has called a latent. of_these: whether that was for these weights."""

    text: str
    written: str
    of_these: bool


def routes(explorer: Explorer) -> list[BaseRoute]:
    if explorer.latents is None:
        return []

    def page(request: Request) -> Response:
        latent = explorer.latent(request.path_params["latent"])
        return explorer.page(request, "latent.html", here="latents", **_values(explorer, request, latent))

    async def write(request: Request) -> Response:
        fields = await form(request, explorer.form_key)
        number = request.path_params["latent"]
        return await run_in_threadpool(_write, explorer, request, number, fields.get("text", ""))

    return [
        Route("/latent/{latent:int}", page),
        Route("/latent/{latent:int}/label", write, methods=["POST"]),
    ]


def _write(explorer: Explorer, request: Request, number: int, text: str) -> Response:
    """Writes a label. -> it as it now is, for a script; for a form, the way back to the latent."""
    latent = explorer.latent(number)
    explorer.db.write_label(number, " ".join(text.split()))
    if "application/json" not in request.headers.get("accept", ""):
        return RedirectResponse(f"/latent/{number}", 303)
    label = _label(explorer.db, latent)
    return as_json({"text": label.text, "about": _written(label)})


def _values(explorer: Explorer, request: Request, latent: Latent) -> dict[str, Any]:
    """What the template shows."""
    db, counts = explorer.db, explorer.db.histogram(latent.latent)
    wide = request.query_params.get("wide") == "1"
    listing, around = _place(db, request, latent.latent)
    label = _label(db, latent)
    raised, lowered = db.logit_weights(latent.latent)
    return {
        "latent": latent,
        "label": label,
        "written": _written(label),
        "longest": LONGEST_LABEL,
        "parts": _parts(db, latent, counts, wide),
        "bars": histogram(counts, latent.max_act),
        "lines": decades(counts),
        "width": WIDTH,
        "height": HEIGHT,
        "tokens": db.tokens_of(latent.latent),
        "raised": raised,
        "lowered": lowered,
        "logits": db.meta.get("logits") or {"what": None, "why": None},
        "neighbours": db.neighbours(latent.latent),
        "cofiring": db.cofiring(latent.latent),
        "listing": listing,
        "order": SORTS[listing.sort][0],
        "around": around,
        "table": listing.on(1 + (around.at if around else 0) // ROWS).address(),
        "wide": wide,
        "with_wide": urlencode(dict(request.query_params) | {"wide": "1"}),
        "without_wide": urlencode({name: value for name, value in request.query_params.items() if name != "wide"}),
        "steer": steer_command(db.meta, str(explorer.run), latent),
    }


def _place(db: LatentsDB, request: Request, latent: int) -> tuple[Listing, Around | None]:
    """The listing that a latent was opened from, and what stands beside it there; else the order of numbers."""
    at = whole(request.query_params, "at", 0)
    if at is not None:
        listing = Listing.of(request.query_params).on(1)
        around = listing.around(db, latent, at) if at < db.n_latents else None
        if around is not None:
            return listing, around
    listing = Listing(sort="latent")
    return listing, listing.around(db, latent, latent)


def _label(db: LatentsDB, latent: Latent) -> Label:
    found = db.label_of(latent.latent)
    return Label("", "", True) if found is None else Label(*found)


def _written(label: Label) -> str:
    """When a label was written, and a warning where that was for other weights."""
    if not label.text:
        return ""
    when = f"Written {label.written[:10]}"
    return when if label.of_these else f"{when}, for other weights of this run: the latent may have changed since"


def _parts(db: LatentsDB, latent: Latent, counts: np.ndarray, wide: bool) -> list[Part]:
    """A latent's examples by the interval that they were drawn from, the strongest first."""
    of_part: dict[int, list[Shown]] = {}
    for example in db.examples(latent.latent):
        of_part.setdefault(example.part, []).append(_shown(db, example, latent, wide))
    portions, step = shares(counts, INTERVALS), latent.max_act / INTERVALS
    parts = []
    for number, shown in sorted(of_part.items()):
        low, high = (INTERVALS - number) * step, (INTERVALS - number + 1) * step
        about = f"{act(low)} to {act(high)}" if number else "Strongest"
        parts.append(Part(about, portions[number - 1] if number else None, shown))
    return parts


def _shown(db: LatentsDB, example: Example, latent: Latent, wide: bool) -> Shown:
    runs = shaded(example, latent.max_act)
    if not wide:
        return Shown(example, runs, [], [])
    codes = db.codes(example.context.sequence)

    def shown(context: Context | None) -> list[Run]:
        if context is None:
            return []
        return shaded(Example(-1, 0.0, -1, acts_in(context, codes, latent.latent), context), latent.max_act)

    before, after = db.beside(example.context)
    return Shown(example, runs, shown(before), shown(after))


def histogram(counts: np.ndarray, most: float) -> list[Bar]:
    """Bars of a latent's firings by activation, heights by the logarithm, so that a single one shows."""
    top = math.log1p(int(counts.max()))
    width, step = WIDTH / len(counts), most / len(counts)
    bars = []
    for place, count in enumerate(counts.tolist()):
        if count:
            height = HEIGHT * math.log1p(count) / top
            title = f"{act(place * step)} to {act((place + 1) * step)}: {count:,} firings"
            bars.append(Bar(place * width, HEIGHT - height, width - 0.7, height, title))
    return bars


def decades(counts: np.ndarray) -> list[tuple[float, str]]:
    """Heights of the histogram that stand for 1, 10, 100 and so on, the last of them three apart at least."""
    most = int(counts.max())
    if not most:
        return []
    powers = range(len(str(most)))
    step = -(-len(powers) // 4)
    return [(HEIGHT * (1 - math.log1p(10**power) / math.log1p(most)), f"{10**power:,}") for power in powers][::step]


def steer_command(meta: dict[str, Any], run: str, latent: Latent) -> str:
    """How to set the latent to its largest activation in the model, at a terminal."""
    model = str(meta.get("sae", {}).get("model") or "MODEL")
    words = [
        "saefast",
        "steer",
        model,
        run,
        "--set",
        f"{latent.latent}={_value(latent.max_act)}",
        "--prompt",
        "I think",
    ]
    return shlex.join(words)


def _value(most: float) -> str:
    return f"{most:.3g}" if most < 1000 else f"{most:.0f}"
