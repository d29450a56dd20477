"""A few hundred damaged files, every one refused, fallen back from or harmless; `make attack` takes 20,000."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from attack import fuzz, outcome, readers
from attack.pool import ROOT

CASES = 260
SEED = 0


@pytest.mark.parametrize("part", ["fuzz", "formats", "latents"])
def test_damaged_files(part: str) -> None:
    rows = list(fuzz.run(range(CASES), SEED, part=part))
    assert len(rows) == CASES
    faults = [f"{row.outcome}: {row.what}: {row.detail}; {row.again}" for row in rows if row.outcome in outcome.FAULTS]
    assert not faults, "\n".join(faults)
    assert {row.subject for row in rows} == {reader.name for reader in readers.available(part)}
    # Were the damage never noticed, there would be nothing to see either.
    counts = {name: sum(row.outcome == name for row in rows) for name in outcome.GOOD}
    assert counts[outcome.REFUSED] > CASES / 4
    if part == "fuzz":
        assert counts[outcome.FELL_BACK] > CASES / 50


def test_a_case_is_the_same_in_every_process(tmp_path: Path) -> None:
    """What is made in another process, whose hashes and memory differ, is the same to the byte."""
    script = "import sys; from attack.test_fuzz import write; write(sys.argv[1])"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "there")], env=os.environ | {"PYTHONPATH": paths}, check=True
    )
    write(str(tmp_path / "here"))
    files = [path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert len(files) > 80
    for file in files:
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes(), file


def write(folder: str) -> None:
    """The readers' folders in `folder`, one after the other in one place, for some files name where they lie."""
    for reader in readers.available():
        readers.write_all(Path(folder).parent / "work", reader)
        readers.copy_of(Path(folder).parent / "work", Path(folder, reader.name))


@pytest.mark.parametrize("reader", readers.available(), ids=lambda reader: reader.name)
def test_readers_damage_something_and_cover_what_they_damage(tmp_path: Path, reader: readers.Reader) -> None:
    readers.write_all(tmp_path / "x", reader)
    for glob in (*reader.files, *reader.covered):
        assert list((tmp_path / "x").glob(glob)), f"{reader.name}: nothing matches {glob}"
