"""The explorer at full size: latents.db built step by step, how long a page takes, and how soon the first one is there.

    python -m bench.explorer [--run FOLDER] [--parts build start pages] [--out DIR] [--quick]

131,072 latents of 768 columns, k = 32, on 1M tokens of a made-up run (bench/explorer_run.py), which is made once, in
runs/explorer-bench. build: a process of its own, and its memory while each step goes on. start: `saefast explore`
until its first page is answered, in a fresh process each time. pages: answers over HTTP, one after the other, each of
another latent, page or word. A part that is not asked for keeps the figures that the results file has.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import numpy as np

from bench import common, explorer_run
from bench.explorer_run import Size
from bench.watched import steps_of
from saefast.explorer.listing import ROWS, SORTS
from saefast.latents.database import LatentsDB
from saefast.latents.schema import LATENTS_DB

FULL = Size(131_072, 1_000_000, 768, 32, 32_768)
QUICK = Size(2048, 8000, 64, 16, 500)
FOLDER, QUICK_FOLDER = common.ROOT / "runs" / "explorer-bench", common.ROOT / "build" / "explorer-bench"
PARTS = ("build", "start", "pages")
STARTS, REQUESTS = 7, 40
WHAT = "explorer"


class Answer(NamedTuple):
    status: int
    location: str | None
    cookie: str
    body: bytes


class Browser:
    """Asks one process of `saefast explore` for pages, on one connection."""

    def __init__(self, address: str) -> None:
        self.address, self.parts, self.cookie = address, urlsplit(address), ""
        self._connection = HTTPConnection(self.parts.hostname or "", self.parts.port)

    def get(self, path: str) -> Answer:
        headers = {"Cookie": self.cookie} if self.cookie else {}
        self._connection.request("GET", path, headers=headers)
        answer = self._connection.getresponse()
        body, cookie = answer.read(), (answer.getheader("Set-Cookie") or "").partition(";")[0]
        return Answer(answer.status, answer.getheader("Location"), cookie, body)

    def enter(self) -> Answer:
        """Opens the address that was printed, and the page that it leads to."""
        answer = self.get(f"{self.parts.path}?{self.parts.query}")
        self.cookie = answer.cookie
        return self.page(answer.location or "/")

    def page(self, path: str) -> Answer:
        answer = self.get(path)
        if answer.status != 200:
            raise SystemExit(f"{path}: the answer is {answer.status}: {answer.body[:300]!r}")
        return answer

    def close(self) -> None:
        self._connection.close()


@contextmanager
def exploring(run: Path) -> Iterator[Browser]:
    """A process of `saefast explore`, and who asks it, once it has printed its address."""
    command = [sys.executable, "-m", "saefast", "explore", str(run), "--no-browser", "--port", "0"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=common.ROOT, text=True, encoding="utf-8")
    try:
        assert child.stdout is not None
        lines = iter(child.stdout)
        address = next((word for line in lines for word in line.split() if word.startswith("http://")), None)
        if address is None:
            raise SystemExit(f"saefast explore {run} ended without an address")
        browser = Browser(address)
        yield browser
        browser.close()
    finally:
        child.terminate()
        child.wait()


def measure_starts(run: Path, times: int) -> dict[str, Any]:
    """Seconds from the command to the first page."""
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        with exploring(run) as browser:
            browser.enter()
            seconds.append(time.perf_counter() - begun)
    return {"seconds": list(common.spread(seconds)), "most": max(seconds), "times": times}


class Case(NamedTuple):
    """Pages of a kind: each path is another one, so that nothing is answered from memory of the one before."""

    what: str
    paths: list[str]


def cases(db: LatentsDB, requests: int) -> list[Case]:
    """What is asked for, from the facts of the database: words of every frequency, latents and pages at random."""
    rng = np.random.default_rng(0)
    last = -(-db.n_latents // ROWS)
    deep = rng.integers(last // 2, last, requests).tolist()
    latents = rng.integers(0, db.n_latents, requests).tolist()
    words = [text.strip() for (text,) in db.query("SELECT text FROM tokens WHERE length(text) > 3 ORDER BY n DESC")]
    contexts = rng.integers(1, db.query("SELECT max(context) FROM contexts")[0][0] + 1, requests).tolist()
    phrases = [phrase(db, context) for context in contexts]
    densities = [100 * density for density in np.quantile(db.array("density"), rng.random(requests)).tolist()]
    sparse = max(db.page(limit=1, dead=False, dense=False)[1] // ROWS // 2, 1)
    found = [Case(f"browse by {sort}, first page", [f"/?sort={sort}"] * requests) for sort in SORTS]
    found += [Case(f"browse by {sort}, deep page", [f"/?sort={sort}&page={page}" for page in deep]) for sort in SORTS]
    return [
        *found,
        Case("browse, neither dead nor dense, deep page", [f"/?sort=score&show=sparse&page={sparse}"] * requests),
        Case("browse, by density from a value on", [f"/?sort=score&density_from={least:.6g}" for least in densities]),
        Case("latent", [f"/latent/{latent}" for latent in latents]),
        Case("search: frequent word", [f"/?q={quote(word)}" for word in words[:requests]]),
        Case("search: rare word", [f"/?q={quote(word)}" for word in words[-requests:]]),
        Case("search: three words", [f"/?q={quote(words)}" for words in phrases]),
        Case("map, page", ["/map"] * requests),
        Case("map, all points", ["/map/points"] * requests),
    ]


def phrase(db: LatentsDB, context: int) -> str:
    """Three words that stand together in a context."""
    words = "".join(db.context(context).pieces).split()
    return " ".join(words[len(words) // 2 :][:3])


def measure_pages(run: Path, requests: int) -> list[dict[str, Any]]:
    rows = []
    with exploring(run) as browser:
        browser.enter()
        for what, paths in cases(LatentsDB(run / LATENTS_DB), requests):
            seconds, sizes = [], []
            for path in paths:
                begun = time.perf_counter()
                answer = browser.page(path)
                seconds.append(time.perf_counter() - begun)
                sizes.append(len(answer.body))
            rows.append({"what": what, "seconds": list(common.spread(seconds)), "most": max(seconds),
                         "bytes": int(median(sizes)), "requests": len(paths)})  # fmt: skip
    return rows


def measure_build(run: Path, size: Size) -> dict[str, Any]:
    """Seconds and memory of each step, and the file that comes of it."""
    (run / LATENTS_DB).unlink(missing_ok=True)
    steps = steps_of("bench.explorer_child", str(run), str(size.n_rows))
    db = LatentsDB(run / LATENTS_DB)
    return {
        "steps": [step._asdict() for step in steps],
        "seconds": sum(step.seconds for step in steps),
        "resident": max(step.resident for step in steps),
        "anonymous": max(step.anonymous for step in steps),
        "file": (run / LATENTS_DB).stat().st_size,
        "rows": db.meta["n_rows"],
        "l0": db.meta["l0"],
        "dead": db.query("SELECT sum(dead) FROM latents")[0][0],
    }


def main(argv: Sequence[str] | None = None) -> int:
    options = common.arguments(
        "bench.explorer", __doc__, argv,
        run=dict(type=Path, help="folder of the made-up run; it is made where it is missing"),
        parts=dict(nargs="+", default=list(PARTS), choices=PARTS),
    )  # fmt: skip
    quick = options.quick or options.rehearse
    size, requests, starts = (QUICK, 3, 1) if quick else (FULL, REQUESTS, STARTS)
    run = explorer_run.make(options.run or (QUICK_FOLDER if quick else FOLDER), size)
    file = options.out / common.file_name(common.device_name("cpu"), WHAT)
    results = known(file, size)
    measures: dict[str, Callable[[], Any]] = {
        "build": lambda: measure_build(run, size),
        "start": lambda: measure_starts(run, starts),
        "pages": lambda: measure_pages(run, requests),
    }
    for part in options.parts:
        results[part] = measures[part]()
        print_part(part, results[part])
        common.write_results(options.out, "cpu", WHAT, results)
    return 0


def known(file: Path, size: Size) -> dict[str, Any]:
    """The parts that a results file of this size has."""
    kept = json.loads(file.read_text(encoding="utf-8"))["results"] if file.exists() else {}
    return kept if kept.get("size") == size._asdict() else {"size": size._asdict(), "cores": os.cpu_count()}


def print_part(part: str, found: Any) -> None:
    rows = {"build": lambda: found["steps"] + [found], "start": lambda: [found], "pages": lambda: found}[part]()
    common.print_table([{name: shown(name, value) for name, value in row.items() if name != "steps"} for row in rows])


def shown(name: str, value: Any) -> Any:
    """Bytes in MB, and a spread in ms."""
    if name in ("resident", "anonymous", "file", "bytes"):
        return f"{value / 1e6:,.2f} MB"
    if name == "most" or isinstance(value, list):
        return " ".join(f"{1e3 * second:.1f}" for second in (value if isinstance(value, list) else [value])) + " ms"
    return value


if __name__ == "__main__":
    raise SystemExit(main())
