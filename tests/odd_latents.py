"""Text that breaks what is careless, put into a made-up latents.db, and its codes as a plain matrix."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from saefast.latents.database import LatentsDB

# Markup, ends of blocks of script and style, quotes, control characters, a character of three tokens, the three ways to
# end a line, text from right to left, and what templates and Markdown read as their own.
ODD = (
    "<script>alert(1)</script>", "</style>", "<!--", "]]>", "<img src=x onerror=alert(2)>", "\"'`", "\n", "\u2028",
    "\0", "\x1b[2J", "", "", "\u5927", "\U0001f600", "\u202eabc", " {{ 1 + 1 }}", "$x_1$", "|*_", "&lt;", " ",
)  # fmt: skip

HOSTILE = "<script>alert(1)</script></title></style><b onclick=x>&amp;\"'{{ 7*7 }}"


@contextmanager
def written(path: Path) -> Iterator[sqlite3.Connection]:
    """The file, to be changed."""
    with closing(sqlite3.connect(path)) as connection, connection:
        yield connection


def set_pieces(path: Path, context: int, pieces: list[str]) -> None:
    """Gives the positions of a context other text."""
    lengths = np.array([len(piece) for piece in pieces], "<u2").tobytes()
    with written(path) as db:
        db.execute("UPDATE contexts SET text = ?, lengths = ? WHERE context = ?", ("".join(pieces), lengths, context))


def set_meta(path: Path, name: str, value: str) -> None:
    with written(path) as db:
        db.execute("UPDATE meta SET value = ? WHERE name = ?", (value, name))


def set_acts(path: Path, factor: float) -> None:
    """Makes all activations `factor` times larger."""
    larger = np.float32(factor)
    with written(path) as db:
        db.create_function("larger", 1, lambda act: float(np.float32(act) * larger))
        db.create_function("all_larger", 1, lambda acts: (np.frombuffer(acts, "<f4") * larger).astype("<f4").tobytes())
        db.execute("UPDATE codes SET acts = all_larger(acts)")
        db.execute("UPDATE latents SET max_act = larger(max_act), mean_act = larger(mean_act)")
        db.execute("UPDATE examples SET act = larger(act)")


def dense(path: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of each sequence: its activations (n, L) float32 and its tokens (n,) int32, straight from the tables."""
    with closing(sqlite3.connect(path)) as db:
        n_latents = db.execute("SELECT count(*) FROM latents").fetchone()[0]
        rows = db.execute(
            "SELECT n, tokens, latents, positions, acts FROM sequences JOIN codes USING (sequence) ORDER BY sequence"
        ).fetchall()
    all_acts, all_tokens = [], []
    for n, tokens, latents, positions, acts in rows:
        matrix = np.zeros((n, n_latents), np.float32)
        place = np.frombuffer(positions, "<u2").astype(int), np.frombuffer(latents, "<i4")
        np.add.at(matrix, place, np.frombuffer(acts, "<f4"))
        all_acts.append(matrix)
        all_tokens.append(np.frombuffer(tokens, "<i4"))
    return all_acts, all_tokens


def attack(path: Path) -> None:
    """Puts markup into every text."""
    with written(path) as db:
        db.execute("UPDATE tokens SET text = ? || token", (HOSTILE,))
        db.execute("UPDATE latents SET title = ? || latent", (HOSTILE,))
    for context, start, stop in LatentsDB(path).query("SELECT context, start, stop FROM contexts"):
        set_pieces(path, context, [ODD[(context + place) % len(ODD)] for place in range(stop - start)])
    for name, value in {
        "sae": {"digest": "d", "model": HOSTILE, "hook": HOSTILE},
        "rows": {"source": HOSTILE, "data": HOSTILE, "rows": 3},
        "score": HOSTILE,
        "unit": HOSTILE,
    }.items():
        set_meta(path, name, json.dumps(value))
    db = LatentsDB(path)
    for latent in (1, 2, 3):
        db.write_label(latent, HOSTILE)
