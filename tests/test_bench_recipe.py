"""`bench.recipe`: the world it samples, its table, and that a stopped one goes on where it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import recipe, recipe_rows, recipe_runs
from bench.recipe_cells import ALWAYS, CELLS, QUICK, Cell, all_variants, variants
from bench.recipe_table import BEGIN, END, markdown, newest, page, summary
from bench.recipe_world import World, best_cosines, found_by_frequency, probabilities

CELL = Cell("world", 64, 4, 4096)
SMALL = World(N=512, D=32, L0=4)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    np.savez(recipe_rows.truth_file(folder), directions=SMALL.directions.numpy(), p=SMALL.p.numpy())
    recipe_rows.save(recipe_rows.heldout_file(folder, "world"), SMALL.batches(700, seed=1, size=500), 700, SMALL.D)
    recipe_rows.save(recipe_rows.train_file(folder, "world"), SMALL.batches(6000, seed=2, size=500), 6000, SMALL.D)
    return folder


def test_features_fire_as_often_as_they_should_and_once_a_row() -> None:
    world, B = World(N=2000, D=8, L0=8), 200_000
    token, feature = world.fired(B, np.random.default_rng(3))
    assert len(np.unique(token * world.N + feature)) == len(token)
    assert (np.diff(token) >= 0).all()
    counts, p = np.bincount(feature, minlength=world.N), world.p.numpy()
    # Pooled where they are rare, so that each of these is nearly normal: a sum of squares about 2000 ± √(2 · 2000).
    squares = (counts - B * p) ** 2 / (B * p * (1 - p))
    assert B * p.min() > 30
    assert abs(squares.sum() - world.N) < 5 * (2 * world.N) ** 0.5
    # Independent, so the number in a row varies as a sum of Bernoullis does: a cell counted twice would show.
    in_a_row = np.bincount(token, minlength=B)
    assert in_a_row.mean() == pytest.approx(8, abs=5 * (8 / B) ** 0.5)
    assert in_a_row.var() == pytest.approx(float((p * (1 - p)).sum()), rel=0.03)


def test_probabilities_are_capped_powers_with_the_sum_asked_for() -> None:
    p = probabilities(32_768, 8, 1.0, 0.25)
    assert float(p.sum()) == pytest.approx(8, rel=1e-9)
    assert float(p.max()) == 0.25
    below = p[p < 0.25]
    ranks = torch.arange(32_768 - len(below) + 1, 32_769, dtype=torch.float64)
    assert torch.allclose(below * ranks, (below * ranks)[0].expand_as(below), rtol=1e-12)


def test_rows_are_the_sum_of_what_fired() -> None:
    class Still(np.random.Generator):
        """All sizes 1, and no noise."""

        def standard_normal(self, size: Any = None, dtype: Any = np.float64) -> Any:
            return np.zeros(size, dtype)

    world = World(N=512, D=32, L0=4)
    x = world.rows(50, Still(np.random.PCG64(5)))
    token, feature = world.fired(50, np.random.Generator(np.random.PCG64(5)))
    assert set(range(50)) - set(token), "an empty row is among them"
    expected = world.bias.repeat(50, 1).double()
    for row, number in zip(token, feature, strict=True):
        expected[row] += world.directions[number].double()
    assert torch.allclose(x.double(), expected, atol=1e-5)


def test_a_stream_is_the_seeds_and_the_world_is_not() -> None:
    first, again, other = (next(SMALL.batches(10, seed=seed, size=10)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(World(N=512, D=32, L0=4).directions, SMALL.directions)


def test_features_found_are_counted_by_frequency() -> None:
    directions = torch.eye(4)
    W_dec = torch.tensor([[2.0, 0, 0, 0], [0, 0.95, 0.3, 0], [0, 0, 1, 1]])
    cosines = best_cosines(directions, W_dec, chunk=3)
    assert cosines.tolist() == pytest.approx([1, 0.9536, 0.7071, 0.7071], abs=1e-4)
    p = torch.tensor([0.2, 0.02, 0.03, 0.002], dtype=torch.float64)
    found = found_by_frequency(cosines, p, torch.tensor([-4, -3, -2, -1, 0], dtype=torch.float64))
    assert found == {"log10_p": [-2.5, -1.5, -0.5], "share": [0.0, 0.5, 1.0], "features": [1, 2, 1]}


def run(rows: Path, folder: Path) -> int:
    files = {"rows": rows, "runs": folder / "runs.jsonl", "out": folder, "page": folder / "page.md"}
    files["picture"] = folder / "picture.png"
    named = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    return recipe.main([*named, "--no-peers", "--variants", "1", "--only", "world"])


def test_a_stopped_table_goes_on_where_it_was(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "CELLS", (CELL,))
    made: list[dict[str, Any]] = []
    true_run = recipe_runs.ours

    def counted(folder: Path, cell: Cell, override: dict[str, Any]) -> dict[str, Any]:
        if len(made) == 2 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        made.append(dict(override))
        return true_run(folder, cell, override)

    monkeypatch.setattr(recipe_runs, "ours", counted)
    with pytest.raises(KeyboardInterrupt):
        run(rows, tmp_path)
    assert len(made) == 2
    with (tmp_path / "runs.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"cell": {"kind": "wor')  # as a killed process leaves it
    (tmp_path / "again").touch()
    run(rows, tmp_path)
    assert len(made) == 4, "the default, half and twice the rate, one more: each once"
    run(rows, tmp_path)
    assert len(made) == 4
    results = recipe.Runs(tmp_path / "runs.jsonl").read()
    assert [result["name"] for result in results][:3] == ["default", *ALWAYS]
    assert [result["asked"].get("override", {}) for result in results] == made
    default = results[0]
    assert made[1]["lr"] == default["settings"]["lr"] / 2
    assert 0 < default["fvu"] < 2
    assert sum(default["world"]["features"]) == SMALL.N
    (file_,) = tmp_path.glob("*-recipe.json")
    written = json.loads(file_.read_text(encoding="utf-8"))["results"]
    assert [row["latents"] for row in written["cells"]] == [64]
    assert written["cells"][0]["runs"] == 4
    assert BEGIN in (tmp_path / "page.md").read_text(encoding="utf-8")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_package_that_failed_is_tried_again(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = recipe.Runs(tmp_path / "runs.jsonl")
    bench = recipe.Bench(rows, runs, 0, True, tmp_path / "no-python")
    monkeypatch.setattr(recipe_runs, "of_package", lambda *_, **__: {"failed": "no memory", "source": "package"})
    bench.once(CELL, bench.same_tokens(CELL, "SAELens"))
    assert runs.read() == []
    done = {"fvu": 0.5, "silent": 0.0, "tokens": 4096, "cpu_seconds": 1.0, "source": "package"}
    monkeypatch.setattr(recipe_runs, "of_package", lambda *_, **__: done)
    bench.once(CELL, bench.same_tokens(CELL, "SAELens"))
    assert [result["fvu"] for result in runs.read()] == [0.5]


def test_a_cell_that_another_process_has_is_left_to_it(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "CELLS", (CELL,))
    runs = recipe.Runs(tmp_path / "runs.jsonl")
    with runs.claimed(CELL) as mine:
        assert mine
        run(rows, tmp_path)
        assert runs.read() == []
    with runs.claimed(CELL) as mine:
        assert mine


def test_the_default_sets_nothing_but_shape_tokens_and_seed(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def watched(*arguments: Any, **named: Any) -> Any:
        seen.append((arguments, named))
        return recipe_runs.SAE(arguments[1], seed=0)

    monkeypatch.setattr(recipe_runs, "train", watched)
    recipe_runs.ours(rows, CELL, {})
    (file, sae_config, config), _ = seen[0]
    assert file == recipe_rows.train_file(rows, "world")
    assert sae_config == recipe_runs.SAEConfig(d_in=32, n_latents=64, k=4)
    assert config == recipe_runs.TrainConfig(n_tokens=4096, seed=0)


def test_a_run_that_diverges_is_a_result(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverges(*arguments: Any, **named: Any) -> Any:
        raise recipe_runs.InputError("the loss is nan")

    monkeypatch.setattr(recipe_runs, "train", diverges)
    assert recipe_runs.ours(rows, CELL, {})["failed"] == "the loss is nan"


def result(cell: Cell, name: str, fvu: float, what: str = "variant", **more: Any) -> dict[str, Any]:
    asked = {"what": what, "name": name} | ({"peer": name, "as": more.pop("as_", "tokens")} if what == "peer" else {})
    settings = {"batch_size": 512, "lr": 1e-3}
    figures = {"fvu": fvu, "silent": 0.01, "cpu_seconds": 5.0, "tokens": cell.tokens, "source": "saefast"}
    return {"cell": cell._asdict(), "name": name, "asked": asked, "settings": settings, **figures, **more}


SMALLER, LARGER = Cell("x", 128, 4, 100_000), Cell("x", 256, 4, 100_000)


def holds(results: list[dict[str, Any]]) -> list[bool]:
    return [check["holds"] for check in summary(newest(results))["checks"]]


def good() -> list[dict[str, Any]]:
    """Results of which everything holds, each limit reached."""
    return [
        result(SMALLER, "default", 0.100, "default", silent=0.02),
        result(SMALLER, "lr × 2", 0.100 / 1.05),
        result(LARGER, "default", 0.102, "default"),
        result(LARGER, "lr × 2", 0.101),
        *(result(LARGER, "SAELens", 0.103, "peer", as_=what, source="package") for what in ("tokens", "time")),
        *(result(LARGER, name, 0.102 * 1.05) for name in ("adam-lean", "autograd")),
    ]


BREAKS: dict[str, tuple[int, Callable[[dict[str, Any]], None], int]] = {
    "a better variant": (1, lambda r: r.update(fvu=0.0952), 0),
    "silent latents": (0, lambda r: r.update(silent=0.0201), 1),
    "a worse large dictionary": (2, lambda r: r.update(fvu=0.1021), 2),
    "an optimiser that the rule does not suit": (6, lambda r: r.update(fvu=0.1072), 3),
    "an engine that the rule does not suit": (7, lambda r: r.update(fvu=0.1072), 4),
    "a better peer": (4, lambda r: r.update(fvu=0.102), 5),
    "a better peer in the time": (5, lambda r: r.update(fvu=0.05), 6),
}


def test_what_has_to_hold_holds_up_to_its_limit() -> None:
    assert holds(good()) == [True] * 7


@pytest.mark.parametrize("name", BREAKS)
def test_what_does_not_hold_is_said(name: str) -> None:
    number, change, check = BREAKS[name]
    results = good()
    change(results[number])
    assert holds(results) == [i != check for i in range(7)]


def test_silent_latents_are_forgiven_where_tokens_are_too_few() -> None:
    short = Cell("x", 128, 4, 31_999)
    assert "silent" not in str(summary([result(short, "default", 0.1, "default", silent=0.5)])["checks"])
    enough = Cell("x", 128, 4, 32_000)
    assert holds([result(enough, "default", 0.1, "default", silent=0.5)]) == [True, False]


def test_an_earlier_default_is_one_of_the_others() -> None:
    earlier, later = result(SMALLER, "default", 0.08, "default"), result(SMALLER, "default", 0.1, "default")
    earlier["settings"] = {"batch_size": 64, "lr": 5e-4}
    earlier["asked"] = later["asked"] | {"settings": earlier["settings"]}
    found = newest([earlier, later, result(SMALLER, "lr × 2", 0.09)])
    row = summary(found)["cells"][0]
    assert (row["FVU"], row["best"], row["best is"], row["runs"]) == (0.1, 0.08, "an earlier default", 3)


def test_failed_runs_are_never_the_best_and_a_failed_default_is_infinitely_bad() -> None:
    broken = result(SMALLER, "lr × 4", 0.0)
    del broken["fvu"]
    assert summary([result(SMALLER, "default", 0.1, "default"), broken])["cells"][0]["best"] == 0.1
    failed = result(SMALLER, "default", 0.0, "default")
    del failed["fvu"]
    assert holds([failed, result(SMALLER, "lr × 2", 0.2)])[0] is False


def test_the_page_keeps_what_is_written_around_the_table(tmp_path: Path) -> None:
    table, file = summary(good()), tmp_path / "page.md"
    file.write_text(f"# Title\n\nfirst\n{BEGIN}\nbefore\n{END}\nlast\n", encoding="utf-8")
    page(table, file)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\nfirst\n")
    assert text.endswith(f"{END}\nlast\n")
    assert "before" not in text
    assert markdown(table) in text
    assert "| x | 256 | 4 | 0.1M | 0 | **0.1020** | 0.103 (1.0×) | – | – | 0.103 (1.0×, 0.1M) | – | – |" in text
    file.write_text("no marks", encoding="utf-8")
    with pytest.raises(SystemExit, match="needs the lines"):
        page(table, file)
    assert file.read_text(encoding="utf-8") == "no marks"


def test_cells_and_variants_are_drawn_alike_every_time() -> None:
    assert len(set(CELLS)) == len(CELLS)
    assert len({cell.kind for cell in CELLS}) >= 4
    default = {"batch_size": 512, "lr": 1e-3, "init": "tied", "lr_decay_share": 0.2, "lr_warmup_steps": 20}
    default["auxk_coef"] = 1 / 32
    found = variants(CELL, default, 3)
    assert found == variants(CELL, default, 3)
    assert list(found)[:2] == list(ALWAYS)
    assert len(found) == 5
    assert list(variants(Cell("x", 32768, 32, 400_000), default, 3)) == list(ALWAYS)
    assert list(variants(QUICK[0], default, 0)) == [*ALWAYS, "adam-lean", "autograd"]
    every = all_variants(CELL, default)
    assert "init tied" not in every, "what the default does anyway is no variant"
    assert "decay over 0.2" not in every
    assert {"lr × 1/4", "lr × 4", "batch × 1/2", "no warm-up", "init tied_0.1"} <= set(every)


@pytest.mark.peers
@pytest.mark.parametrize("peer", recipe.PEERS)
@pytest.mark.parametrize("seconds", [None, 0.2])
def test_a_peers_own_package_trains_by_its_defaults(rows: Path, peer: str, seconds: float | None) -> None:
    import sys

    cell = Cell("world", 64, 4, 3 * 8192)
    found = recipe_runs.of_package(rows, cell, peer, seconds, python=Path(sys.executable))
    assert "failed" not in found, found
    assert found["source"] == "package"
    assert 0 < found["fvu"] < 2
    assert found["settings"]["batch_size"] == recipe_runs.PRESET_BATCH[peer]
    if seconds is None:
        assert found["tokens"] == cell.tokens
    else:
        assert found["tokens"] % found["settings"]["batch_size"] == 0
        assert found["cpu_seconds"] > seconds
