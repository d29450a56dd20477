"""A latents.db without a model: made up, but whole, with every table filled as schema.py says, of any size."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from saefast.latents.schema import BINS, INTERVALS, LATENTS_DB, PER_INTERVAL, TOP, create, finish

WORDS = tuple(
    "the of bridge river stone steel span cable tower arch over under water road town city north south old new "  # noqa: SIM905
    "built crosses carries opened rail track train ferry boat harbour coast sea wind light night day year month".split()
)


def make_db(
    folder: Path, n_latents: int = 40, n_sequences: int = 12, length: int = 30, k: int = 4, seed: int = 0, **meta: Any
) -> Path:
    """Writes folder/latents.db: sequences of `length` words in contexts of 10, k latents a row. meta: instead of ours.

    Latent 0 is dead, latent 1 dense; all else fires at random, with its largest activations on words of its own.
    """
    rng = np.random.default_rng(seed)
    path = folder / LATENTS_DB
    db = create(path)
    texts = [" " + word for word in WORDS]
    tokens = rng.integers(0, len(WORDS), (n_sequences, length)).astype("<i4")
    db.executemany("INSERT INTO tokens VALUES (?, ?, ?)", _tokens(tokens))
    idx, acts = _code(rng, tokens, n_latents, k)
    contexts = _write_sequences(db, tokens, idx, acts, texts)
    _write_latents(db, idx, acts, tokens, contexts, n_latents)
    _write_relatives(db, rng, n_latents)
    best = "row_number() OVER (ORDER BY score DESC, latent) - 1"
    db.execute(f"INSERT INTO telling SELECT {best}, latent FROM latents WHERE latent % 4 = 1 LIMIT 1000")
    facts = _meta(n_latents, tokens, k) | meta
    db.executemany("INSERT INTO meta VALUES (?, ?)", [(name, json.dumps(value)) for name, value in facts.items()])
    finish(db)
    return path


def _meta(n_latents: int, tokens: np.ndarray, k: int) -> dict[str, Any]:
    return {
        "n_latents": n_latents,
        "n_rows": tokens.size,
        "n_sequences": len(tokens),
        "kind": "text",
        "unit": "tokens",
        "l0": float(k),
        "sae": {
            "digest": "made-up",
            "architecture": "topk",
            "d_in": 16,
            "k": k,
            "hook": "layers.1",
            "model": "made-up",
        },
        "rows": {"source": "made-up rows", "data": "made-up", "rows": tokens.size},
        "score": "The score is made up.",
        "logits": {"what": "logit", "why": None},
        "map": {"method": "pca"},
        "clusters": ["bridge", "river", "stone"],
        "contexts": {"top": TOP, "intervals": INTERVALS, "each": PER_INTERVAL},
        "built": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
    }


def _tokens(tokens: np.ndarray) -> list[tuple[int, str, int]]:
    counts = np.bincount(tokens.ravel(), minlength=len(WORDS)).tolist()
    return [(i, word, n) for i, (word, n) in enumerate(zip(WORDS, counts, strict=True))]


def _code(rng: np.random.Generator, tokens: np.ndarray, n_latents: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """idx and acts (sequences, length, k): latent 1 everywhere, then one that belongs to the word, then any."""
    idx = np.empty((*tokens.shape, k), np.int64)
    idx[..., 0] = 1
    own = 2 + (tokens + len(WORDS) * rng.integers(0, max(n_latents // len(WORDS), 1), tokens.shape)) % (n_latents - 2)
    for column in range(1, k):
        idx[..., column] = 2 + (own - 2 + (column - 1) * 7) % (n_latents - 2)
    acts = rng.random(idx.shape).astype(np.float32) + 0.01
    acts[..., 1] += 1
    return idx, acts


def _write_sequences(db: Any, tokens: np.ndarray, idx: np.ndarray, acts: np.ndarray, texts: list[str]) -> int:
    """-> positions in a context."""
    each = 10
    for number, ids in enumerate(tokens):
        n = len(ids)
        db.execute("INSERT INTO sequences VALUES (?, ?, NULL, ?, ?)", (number, number + 100, ids.tobytes(), n))
        latents, positions = idx[number].ravel(), np.repeat(np.arange(n), idx.shape[2])
        order = np.lexsort((positions, latents))
        columns = (
            latents[order].astype("<i4"),
            positions[order].astype("<u2"),
            acts[number].ravel()[order].astype("<f4"),
        )
        db.execute("INSERT INTO codes VALUES (?, ?, ?, ?)", (number, *(column.tobytes() for column in columns)))
        for start in range(0, n, each):
            pieces = [texts[token] for token in ids[start : start + each]]
            lengths = np.array([len(piece) for piece in pieces], "<u2").tobytes()
            row = (number, start, start + len(pieces), "".join(pieces), lengths)
            db.execute("INSERT INTO contexts VALUES (NULL, ?, ?, ?, ?, ?)", row)
    return each


def _write_latents(db: Any, idx: np.ndarray, acts: np.ndarray, tokens: np.ndarray, each: int, n_latents: int) -> None:
    n_sequences, length, k = idx.shape
    flat, values, n_rows = idx.ravel(), acts.ravel(), n_sequences * length
    rows = np.repeat(np.arange(n_rows), k)
    order = np.argsort(flat, kind="stable")
    bounds = np.searchsorted(flat[order], np.arange(n_latents + 1))
    density = np.zeros(n_latents, "<f4")
    per_sequence = -(-length // each)
    for latent in range(n_latents):
        mine = order[bounds[latent] : bounds[latent + 1]]
        density[latent] = len(mine) / n_rows
        top = float(values[mine].max()) if len(mine) else 0.0
        mean = float(values[mine].mean()) if len(mine) else 0.0
        words, counts = np.unique(tokens.ravel()[rows[mine]], return_counts=True)
        ranked = words[np.argsort(-counts, kind="stable")][:8].tolist()
        title = " · ".join(WORDS[word] for word in ranked[:3])
        dense = bool(density[latent] > 0.01)
        fact = (
            latent,
            len(mine),
            float(density[latent]),
            mean,
            top,
            3.0 * (latent % 17) / 17,
            not len(mine),
            dense,
            title,
        )
        db.execute("INSERT INTO latents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", fact)
        if not len(mine):
            continue
        bins = np.minimum((values[mine] / top * BINS).astype(int), BINS - 1)
        db.execute(
            "INSERT INTO histograms VALUES (?, ?)", (latent, np.bincount(bins, minlength=BINS).astype("<i4").tobytes())
        )
        shares = [(latent, rank, word, 0.9 / 2 ** (rank + 1), 0.5, rank < 3) for rank, word in enumerate(ranked)]
        db.executemany("INSERT INTO latent_tokens VALUES (?, ?, ?, ?, ?, ?)", shares)
        best = mine[np.argsort(-values[mine], kind="stable")]
        seen: set[int] = set()
        counts_of_part: dict[int, int] = {}
        for entry in best[:400].tolist():
            row = int(rows[entry])
            sequence, position = divmod(row, length)
            context = 1 + sequence * per_sequence + position // each
            part = 0 if len(seen) < TOP else 1 + min(int((1 - values[entry] / top) * INTERVALS), INTERVALS - 1)
            rank = counts_of_part.get(part, 0)
            if context in seen or rank >= (TOP if part == 0 else PER_INTERVAL):
                continue
            seen.add(context)
            counts_of_part[part] = rank + 1
            example = (latent, part, rank, context, position, float(values[entry]))
            db.execute("INSERT INTO examples VALUES (?, ?, ?, ?, ?, ?)", example)
    db.execute("INSERT INTO arrays VALUES ('density', 'float32', ?, ?)", (json.dumps([n_latents]), density.tobytes()))


def _write_relatives(db: Any, rng: np.random.Generator, n_latents: int) -> None:
    for latent in range(n_latents):
        others = [int(o) for o in rng.integers(0, n_latents, 10) if o != latent]
        db.executemany(
            "INSERT INTO neighbours VALUES (?, ?, ?, ?)",
            [(latent, rank, other, 0.9 - 0.05 * rank) for rank, other in enumerate(others)],
        )
        db.executemany(
            "INSERT INTO cofiring VALUES (?, ?, ?, ?, ?)",
            [(latent, rank, other, 40.0 - rank, 5 + rank) for rank, other in enumerate(others)],
        )
        for side in (1, -1):
            words = rng.permutation(len(WORDS))[:10].tolist()
            db.executemany(
                "INSERT INTO logit_weights VALUES (?, ?, ?, ?, ?)",
                [(latent, side, rank, word, side * (2.0 - 0.1 * rank)) for rank, word in enumerate(words)],
            )
    points = rng.normal(size=(n_latents, 2)).astype("<f4")
    clusters = rng.integers(0, 3, n_latents).astype("<i2")
    for name, dtype, column in (("map", "float32", points), ("cluster", "int16", clusters)):
        db.execute(
            "INSERT INTO arrays VALUES (?, ?, ?, ?)", (name, dtype, json.dumps(list(column.shape)), column.tobytes())
        )
