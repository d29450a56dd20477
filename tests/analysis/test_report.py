"""The pictures of a run and of its latents."""

import sys
from pathlib import Path

import pytest
import torch
from latents_db import make_db

from saefast.analysis.page import shown
from saefast.analysis.plots import draw_curves, draw_density, draw_features
from saefast.errors import InputError
from saefast.latents.database import LatentsDB

PNG = b"\x89PNG\r\n\x1a\n"


def curves(n: int = 30) -> list[dict[str, float]]:
    return [
        {
            "step": s,
            "tokens": 100 * s,
            "losses/overall_loss": 1 / s,
            "fvu": 1 / s,
            "dead_share": 0.0,
            "heldout/fvu": 1.1 / s,
        }
        for s in range(1, n)
    ]


def test_pictures_are_written(tmp_path: Path) -> None:
    draw_curves(curves(), tmp_path / "a.png", "title")
    draw_curves(
        [{"step": 1, "tokens": 5, "losses/overall_loss": 0.0, "fvu": 0.5, "dead_share": 0.0}], tmp_path / "b.png"
    )
    draw_density(torch.tensor([0, 1, 5, 900]), 1000, tmp_path / "c.png")
    draw_density(torch.zeros(4, dtype=torch.int64), 1000, tmp_path / "d.png")
    (tmp_path / "db").mkdir()
    db = LatentsDB(make_db(tmp_path / "db"))
    draw_features([shown(db, db.latent(latent)) for latent in (0, 5, 9)], tmp_path / "e.png", "title")
    written = sorted(tmp_path.glob("*.png"))
    assert [path.name for path in written] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size > 3000 for path in written)


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'saefast\[demo\]'"):
        draw_curves(curves(), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
