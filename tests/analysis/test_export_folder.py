"""An export is there whole or not at all, and takes the place of nothing but an export of its kind."""

import json
import os
from pathlib import Path

import pytest
from latents_db import make_db

from saefast.analysis.delphi import write_delphi
from saefast.analysis.export_folder import MANIFEST, whole_folder
from saefast.analysis.export_names import Names
from saefast.analysis.neuronpedia import write_folder, write_upload
from saefast.analysis.saedashboard import write_saedashboard
from saefast.errors import InputError
from saefast.latents.database import LatentsDB

WRITERS = [write_upload, write_folder, write_saedashboard, write_delphi]


@pytest.fixture
def db(tmp_path: Path) -> LatentsDB:
    return LatentsDB(make_db(tmp_path, n_latents=60, n_sequences=4, length=64))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("write", WRITERS)
def test_a_second_run_replaces_the_first_whole(db: LatentsDB, tmp_path: Path, write: type[write_upload]) -> None:
    out = tmp_path / "deep" / "out"
    write(db, out, range(60), Names(db))
    first = files(out)
    (out / "left.txt").write_text("of the first", encoding="utf-8")
    write(db, out, range(60), Names(db))
    assert files(out) == first
    assert files(out.parent) == sorted(["out", *(f"out/{name}" for name in first)])
    assert json.loads((out / MANIFEST).read_text(encoding="utf-8"))["sae"]["digest"] == "made-up"
    assert out.stat().st_mode & 0o777 == 0o777 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("write", WRITERS)
def test_what_goes_wrong_on_the_way_leaves_what_was_there(
    db: LatentsDB, tmp_path: Path, write: type[write_upload], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write(db, out, range(60), Names(db))
    before = {name: (out / name).read_bytes() for name in files(out) if (out / name).is_file()}

    def stop(n: int) -> None:
        raise KeyboardInterrupt

    for place in (out, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            write(db, place, range(60), Names(db), stop)
    assert {name: (out / name).read_bytes() for name in files(out) if (out / name).is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents.db", "out"]


def test_folders_that_are_no_such_export_are_left_alone(db: LatentsDB, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="mine is not empty and no export of saefast: name another folder"):
        write_upload(db, mine, [1], Names(db))
    with pytest.raises(InputError, match="is a file: expected a folder"):
        write_upload(db, mine / "thesis.tex", [1], Names(db))
    with pytest.raises(InputError, match=r"is a file|cannot be written"):
        write_upload(db, mine / "thesis.tex" / "below", [1], Names(db))
    write_saedashboard(db, tmp_path / "out", [1], Names(db))
    with pytest.raises(InputError, match="holds an export of the kind 'saedashboard': name another folder for neuron"):
        write_upload(db, tmp_path / "out", [1], Names(db))
    assert files(mine) == ["thesis.tex"]
    with pytest.raises(InputError, match="/ is not empty and no export"):
        write_upload(db, "/", [1], Names(db))
    for odd in ("", "a\0b"):
        with pytest.raises(InputError, match="is no path"):
            write_upload(db, odd, [1], Names(db))
    # A manifest that is none is no licence either.
    (mine / MANIFEST).write_text("[1]", encoding="utf-8")
    with pytest.raises(InputError):
        write_upload(db, mine, [1], Names(db))
    assert files(mine) == [MANIFEST, "thesis.tex"]


def test_an_empty_folder_is_taken(db: LatentsDB, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out", "kind", db) as folder:
        (folder / "a").write_text("x", encoding="utf-8")
    assert files(tmp_path / "out") == ["a", MANIFEST]


def test_what_a_link_leads_to_is_written_and_no_path_of_this_machine_is_told(db: LatentsDB, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    db.meta["sae"]["path"] = "/home/me/secret"
    for _ in range(2):
        write_saedashboard(db, tmp_path / "link", range(60), Names(db))
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents.db", "link", "there"]
    assert "secret" not in (tmp_path / "there" / MANIFEST).read_text(encoding="utf-8")
