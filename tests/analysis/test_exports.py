"""Every export by its name, and which latents it is of."""

from pathlib import Path

import pytest
from latents_db import make_db

from saefast.analysis.export_folder import MANIFEST
from saefast.analysis.exports import export, parse_latents, telling
from saefast.errors import InputError
from saefast.files import read_json
from saefast.latents.database import LatentsDB

KINDS = ("page", "neuronpedia", "neuronpedia-folder", "saedashboard", "delphi")


@pytest.fixture
def db(tmp_path: Path) -> LatentsDB:
    return LatentsDB(make_db(tmp_path, n_latents=60, n_sequences=16, length=32))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_written_and_says_what(db: LatentsDB, tmp_path: Path, kind: str) -> None:
    done: list[int] = []
    said = export(db, kind, tmp_path / "out", [3, 4, 3], advance=done.append)
    n = db.latent(3).n_fired + db.latent(4).n_fired if kind == "delphi" else 2
    index = "/index.html" if kind == "page" else ""
    assert said == f"{n:,} {'activations' if kind == 'delphi' else 'latents'} in {tmp_path / 'out'}{index}"
    assert sum(done) == (16 * 32 if kind == "delphi" else 2)
    assert read_json(tmp_path / "out" / MANIFEST)["export"] == kind
    for latents in ([60], [3, -1]):
        with pytest.raises(InputError, match="there is no latent"):
            export(db, kind, tmp_path / "other", latents)
    assert not (tmp_path / "other").exists()


def test_without_a_choice_it_is_all_or_the_most_telling(db: LatentsDB, tmp_path: Path) -> None:
    alive = 60 - db.query("SELECT count(*) FROM latents WHERE dead")[0][0]
    assert export(db, "saedashboard", tmp_path / "all").startswith(f"{alive} latents")
    assert export(db, "page", tmp_path / "page").startswith(f"{alive} latents")
    best = telling(db, 5)
    scores = [db.latent(latent).score for latent in best]
    assert scores == sorted(scores, reverse=True)
    assert len(telling(db, 1000)) == alive


def test_an_unknown_kind_is_refused(db: LatentsDB, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"kind is 'pdf' .*: expected 'page' or 'neuronpedia'"):
        export(db, "pdf", tmp_path / "out")  # type: ignore[arg-type]


def test_latents_are_named_by_numbers_and_ranges() -> None:
    assert parse_latents("5,17,30-33", 40) == [5, 17, 30, 31, 32, 33]
    assert parse_latents(" 7 3, 3-5 ,0,", 40) == [7, 3, 4, 5, 0]
    assert parse_latents("39-39", 40) == [39]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected numbers and ranges, such as 5,17,8000-8010"),
        ("a", "latents is 'a'"),
        ("1,,b", "expected numbers"),
        ("-3", "expected numbers"),
        ("1-2-3", "expected numbers"),
        ("1.5", "expected numbers"),
        ("٣", "expected numbers"),
        ("9-5", "smaller number first in 9-5"),
        ("40", "there is no latent 40: expected 0 to 39"),
        ("0-999999999999999999", "there is no latent 999999999999999999"),
        ("9" * 5000, "expected numbers"),
    ],
)
def test_what_names_no_latents_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_latents(text, 40)
