"""Our default against the best settings that a search around it finds, and against the peers' own defaults.

    python -m bench.recipe [--rows runs/recipe-rows] [--variants 2] [--only minilm-4 ...] [--table] [--quick]

At each cell (kind of rows, latents, k, tokens, seed): the default, which is `train(rows, SAEConfig(d_in, n_latents, k),
TrainConfig(n_tokens, seed))` with nothing else set; the same with some setting changed; the defaults of SAELens,
sparsify and dictionary_learning on the same rows, for as many tokens and for as long a time. Every result goes to the
file --runs at once, so that a stopped run goes on where it was, and several may run at a time: each takes cells that no
other has. At the end, or with --table alone, bench/results/<device>-recipe.json, docs/recipe.md and docs/recipe.png are
made of what is there.
"""

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench import common, recipe_rows, recipe_runs
from bench.recipe_cells import CELLS, QUICK, Cell, variants
from bench.recipe_table import newest, page, summary
from bench.step import PEERS_PYTHON
from saefast.version import __version__

PEERS = ("SAELens", "sparsify", "dictionary_learning")
RUNS = common.ROOT / "runs" / "recipe.jsonl"
PAGE, PICTURE = common.ROOT / "docs" / "recipe.md", common.ROOT / "docs" / "recipe.png"
# Where a package would take longer than this (seconds of two CPU cores), its recipe runs in our engine, if that has it.
PATIENCE, FLOPS = 80.0, 60e9
# Bytes that a package's step takes for each latent and token of its batch, and how many it may take in all.
BYTES, ROOM = {"SAELens": 40, "sparsify": 16, "dictionary_learning": 40}, 16e9


class Job(NamedTuple):
    """name: of the result within its cell. asked: what tells it from others. run: returns the result's figures."""

    name: str
    asked: dict[str, Any]
    run: Callable[[], dict[str, Any]]


class Runs:
    """The file of results: one line of JSON each, appended as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a process that was killed may have left a piece of one."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def append(self, result: Mapping[str, Any]) -> None:
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # What a killed process left of a line must not spoil this one.
            file.seek(0, 2)
            if file.tell():
                file.seek(-1, 2)
                cut_off = file.read(1) != b"\n"
            else:
                cut_off = False
            file.write(b"\n" * cut_off + json.dumps(result).encode() + b"\n")

    def find(self, cell: Cell, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        for result in self.read():
            if result["cell"] == cell._asdict() and result["asked"] == _as_json(asked):
                return result
        return None

    @contextmanager
    def claimed(self, cell: Cell) -> Iterator[bool]:
        """Whether this process has the cell to itself until the block ends; a process that dies lets go of its own."""
        lock = self.path.with_suffix(".locks") / "-".join(map(str, cell))
        lock.parent.mkdir(exist_ok=True)
        with lock.open("w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


class Bench:
    """What all cells of a call share."""

    def __init__(self, rows: Path, runs: Runs, n_variants: int, peers: bool, python: Path) -> None:
        self.rows, self.runs, self.n_variants, self.peers, self.python = rows, runs, n_variants, peers, python
        self.about = {"commit": commit(), "versions": common.versions() | {"saefast": __version__}}
        self.about["device"] = common.device_name("cpu")

    def at(self, cell: Cell) -> None:
        """Everything at a cell that is not there yet."""
        recipe_rows.make(self.rows, cell.kind, _log)
        settings = recipe_runs.chosen(self.rows, cell, {})
        default = self.once(cell, self.default(cell, settings))
        if self.peers:
            for peer in PEERS:
                self.once(cell, self.same_tokens(cell, peer))
                if BYTES[peer] * cell.n_latents * recipe_runs.PRESET_BATCH[peer] <= ROOM:
                    self.once(cell, self.same_time(cell, peer, default))
        for name, override in variants(cell, settings, self.n_variants).items():
            self.once(cell, self.variant(cell, name, override, settings))

    def once(self, cell: Cell, job: Job) -> dict[str, Any]:
        """The job's result: found, or made and kept."""
        known = self.runs.find(cell, job.asked)
        if known is not None:
            return known
        result = {"cell": cell._asdict(), "name": job.name, "asked": _as_json(job.asked), **job.run(), **self.about}
        # A package that failed is tried again; a run of ours that diverged is a result.
        if "failed" not in result or result["source"] == "saefast":
            self.runs.append(result)
        _log(f"{cell.label}: {job.name}: {_in_words(result)}")
        return result

    def default(self, cell: Cell, settings: Mapping[str, Any]) -> Job:
        # Under another rule the default is another run.
        asked = {"what": "default", "settings": dict(settings)}
        return Job("default", asked, lambda: recipe_runs.ours(self.rows, cell, {}) | {"settings": dict(settings)})

    def variant(self, cell: Cell, name: str, override: Mapping[str, Any], settings: Mapping[str, Any]) -> Job:
        # What is not overridden is as the default chooses it.
        asked = {"what": "variant", "override": dict(override), "around": dict(settings)}
        return Job(name, asked, lambda: recipe_runs.ours(self.rows, cell, override) | {"settings": dict(override)})

    def same_tokens(self, cell: Cell, peer: str) -> Job:
        def run() -> dict[str, Any]:
            # sparsify's package trains with signum, its preset with Adam.
            if peer == "sparsify" or self.package_seconds(cell) < PATIENCE:
                return recipe_runs.of_package(self.rows, cell, peer, python=self.python)
            return recipe_runs.of_preset(self.rows, cell, peer)

        return Job(peer, {"what": "peer", "peer": peer, "as": "tokens"}, run)

    def same_time(self, cell: Cell, peer: str, default: Mapping[str, Any]) -> Job:
        # Of the processor: what else the machine does while one of them runs must not decide.
        seconds = default["cpu_seconds"]
        asked = {"what": "peer", "peer": peer, "as": "time", "cpu_seconds": seconds}
        return Job(
            f"{peer}, same time", asked,
            lambda: recipe_runs.of_package(self.rows, cell, peer, seconds, python=self.python),
        )  # fmt: skip

    def package_seconds(self, cell: Cell) -> float:
        """About how long dense products take: five of D · L a token, forward and backward, and passes over (B, L)."""
        flops = 14.0 * cell.n_latents * recipe_runs.width(self.rows, cell.kind) * cell.tokens
        return flops / FLOPS


def commit() -> str:
    """The code's commit, with a + where files differ from it; empty outside a checkout."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"], cwd=common.ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    return found.stdout.strip()


def _in_words(result: Mapping[str, Any]) -> str:
    if "failed" in result:
        return f"failed: {result['failed'][-200:]}"
    figures = f"FVU {result['fvu']:.4f}, silent {result['silent']:.1%}"
    return f"{figures}, {result['tokens']:,} tokens, {result['cpu_seconds']:.0f} CPU s"


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write(runs: Runs, out: Path, page_file: Path, picture: Path) -> bool:
    """The table of what is there as JSON, on the page and as a picture; whether all that it has to show holds."""
    from bench.recipe_plot import draw

    results = newest(runs.read())
    table = summary(results)
    common.write_results(out, "cpu", "recipe", {**table, "runs": results})
    page(table, page_file)
    draw(table, results, picture)
    common.print_table(table["cells"])
    for check in table["checks"]:
        print(f"{'holds' if check['holds'] else 'FAILS'}: {check['check']} ({check['where']}: {check['found']})")
    return all(check["holds"] for check in table["checks"])


def main(argv: Sequence[str] | None = None) -> int:
    options = common.arguments(
        "bench.recipe", __doc__, argv,
        rows=dict(type=Path, default=recipe_rows.FOLDER, help="folder of the rows, made where they are missing"),
        runs=dict(type=Path, default=RUNS, help="file that results are appended to"),
        variants=dict(type=int, default=2, help="other settings to try at each cell, besides half and twice the rate"),
        only=dict(nargs="+", choices=tuple(recipe_rows.KINDS), default=list(recipe_rows.KINDS), help="kinds of rows"),
        table=dict(action="store_true", help="only make the table of what is there"),
        page=dict(type=Path, help="page with the table (default: docs/recipe.md, or beside --out with --quick)"),
        picture=dict(type=Path, help="the same for the picture"),
        python=dict(type=Path, default=PEERS_PYTHON, help="Python of the peers' environment (make peers)"),
        **{"no-peers": dict(action="store_true", help="leave the peers out")},
    )  # fmt: skip
    beside = None if options.out == common.RESULTS else options.out
    runs, page_file = Runs(options.runs), options.page or (beside / PAGE.name if beside else PAGE)
    picture = options.picture or (beside / PICTURE.name if beside else PICTURE)
    if not options.table:
        peers = not options.no_peers and options.python.exists()
        if not peers and not options.no_peers:
            _log(f"{options.python} is not there: no peers in this run (make peers, or --python)")
        bench = Bench(options.rows, runs, options.variants, peers, options.python)
        for cell in QUICK if options.quick else CELLS:
            if cell.kind in options.only:
                with runs.claimed(cell) as mine:
                    if mine:
                        bench.at(cell)
    return 0 if write(runs, options.out, page_file, picture) else 1


if __name__ == "__main__":
    sys.exit(main())
