"""latents.db of small harvests, against the dense code: every kind of SAE, interrupted, built again, odd data."""

import os
import signal
import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hanging import HANG
from spooled import KINDS

from saefast.data.mapped_source import MappedSource
from saefast.data.opening import open_source
from saefast.errors import InputError
from saefast.harvest.to_disk import HarvestConfig, harvest
from saefast.latents import build, schema
from saefast.latents.build import build_latents, rows_of
from saefast.latents.database import LatentsDB
from saefast.latents.schema import BINS
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.training.residual import Part, Stack

D, L = 16, 40
TOKENIZER = tiny_models.tokenizer()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> MappedSource:
    folder = tmp_path_factory.mktemp("acts")
    config = HarvestConfig(hooks=("layers.1",), ctx_len=24, dtype="float32", heldout=0.2, device="cpu")
    given = {"model": tiny_models.model("bert"), "tokenizer": TOKENIZER}
    harvest(folder, config, text=tiny_models.documents(40), progress=False, **given)
    return opened(folder)


def opened(data: Any) -> MappedSource:
    found = open_source(data, shuffle="mapped")
    assert isinstance(found, MappedSource)
    return found


def made(seed: int = 0, **more: Any) -> SAE:
    sae = SAE(SAEConfig(**({"d_in": D, "n_latents": L, "k": 4} | more)), seed=seed).requires_grad_(False)
    sae.b_enc -= 0.3
    sae.b_enc[7] = -1000  # dead
    for name, buffer in sae.named_buffers():
        if name == "threshold":
            buffer.fill_(0.4)
    return sae


def built(sae: SAE | Stack, source: MappedSource, folder: Path, **more: Any) -> LatentsDB:
    tokenizer = TOKENIZER if source.folder is not None else None
    return build_latents(sae, source, folder / "latents.db", **({"tokenizer": tokenizer} | more))


def all_rows(source: MappedSource) -> tuple[torch.Tensor, np.ndarray]:
    """x and the token of each row, held-out ones first."""
    parts = list(rows_of(source, 10**9))
    assert source.folder is not None
    tokens = [
        int(source.folder.tokens(seq)[pos])
        for part in parts
        if part.seq is not None and part.pos is not None
        for seq, pos in zip(part.seq.tolist(), part.pos.tolist(), strict=True)
    ]
    return torch.cat([part.x for part in parts]), np.array(tokens)


def check_latents(db: LatentsDB, code: np.ndarray) -> None:
    rows, _ = db.page("latent", descending=False, limit=L)
    assert [row.latent for row in rows] == list(range(L))
    for row, column in zip(rows, code.T.astype(np.float64), strict=True):
        acts = column[column > 0]
        assert row.n_fired == len(acts)
        assert row.density == pytest.approx(len(acts) / len(code))
        assert row.max_act == pytest.approx(acts.max(initial=0), rel=1e-5)
        assert row.mean_act == pytest.approx(acts.mean() if len(acts) else 0, rel=1e-5)
        assert (row.dead, row.dense) == (len(acts) == 0, len(acts) > 0.01 * len(code))
        counts = db.histogram(row.latent)
        assert (len(counts), counts.sum()) == (BINS, len(acts))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_sae_is_counted_exactly(
    kind: str, source: MappedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that latents come in several ranges.
    monkeypatch.setattr("saefast.latents.spool.Spool.ranges.__defaults__", (500, 11))
    sae = made(activation=kind)
    x, tokens = all_rows(source)
    code = sae.encode(x).numpy()
    done: list[tuple[str, float]] = []
    db = built(sae, source, tmp_path, progress=lambda step, share: done.append((step, share)))
    check_latents(db, code)
    shares = [share for _, share in done]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)
    for latent in range(L):
        acts = code[:, latent]
        sums = np.bincount(tokens, acts)
        for rank, token in enumerate(db.tokens_of(latent)):
            on = tokens == token.token
            assert token.share == pytest.approx(sums[token.token] / acts.sum(), rel=1e-5)
            assert token.covered == pytest.approx((acts[on] > 0).mean())
            assert token.own == (token.share >= 0.04)
            # None has more that is not listed.
            assert sums[token.token] == pytest.approx(np.sort(sums)[-1 - rank], rel=1e-5)
            assert token.text == TOKENIZER.convert_ids_to_tokens(token.token)
        assert len(db.tokens_of(latent)) == min((sums > 0).sum(), 8)
    unit = torch.nn.functional.normalize(sae.W_dec, dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(-2)
    for latent in range(L):
        found = db.neighbours(latent)
        best = cosines[latent].topk(10)
        assert [other.value for other in found] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert [other.latent for other in found] == best.indices.tolist()


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
@pytest.mark.parametrize("at_a_time", [1 << 21, 60])
def test_the_code_of_every_sequence_is_whole(
    kind: str, at_a_time: int, source: MappedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saefast.latents.codes._AT_A_TIME", at_a_time)
    sae = made(activation=kind)
    db = built(sae, source, tmp_path)
    expected: dict[tuple[int, int], np.ndarray] = {}
    for part in rows_of(source, 10**9):
        assert part.seq is not None
        assert part.pos is not None
        places = zip(part.seq.tolist(), part.pos.tolist(), strict=True)
        expected |= dict(zip(places, sae.encode(part.x).numpy(), strict=True))
    seen = 0
    for row, codes in db.all_codes():
        found = np.zeros((row.n, L), np.float32)
        found[codes.positions, codes.latents] = codes.acts
        order = codes.latents.astype(np.int64) << 16 | codes.positions
        assert (np.diff(order) > 0).all()
        for position in range(row.n):
            there = expected.get((row.source_sequence, position))
            seen += there is not None
            np.testing.assert_allclose(found[position], 0 if there is None else there, rtol=1e-5, atol=1e-6)
        assert source.folder is not None
        assert np.array_equal(row.tokens, source.folder.tokens(row.source_sequence).numpy())
    assert seen == len(expected) == db.meta["n_rows"]


def test_examples_are_of_the_rows_that_were_read(source: MappedSource, tmp_path: Path) -> None:
    sae = made()
    db = built(sae, source, tmp_path)
    for latent in range(L):
        facts, shown = db.latent(latent), db.examples(latent)
        assert bool(shown) != facts.dead
        if shown:
            assert shown[0].act == pytest.approx(facts.max_act)
            assert len(shown[0].context.pieces) == len(shown[0].acts)
            assert all(example.acts[example.peak] == pytest.approx(example.act) for example in shown)


def test_the_map_has_a_place_and_a_cluster_for_every_latent(source: MappedSource, tmp_path: Path) -> None:
    sae = made()
    sae.W_dec[5] = 0
    db = built(sae, source, tmp_path)
    points, cluster, density = (db.array(name) for name in ("map", "cluster", "density"))
    assert points is not None
    assert cluster is not None
    assert density is not None
    assert (points.shape, cluster.shape, points.dtype, cluster.dtype) == ((L, 2), (L,), np.float32, np.int16)
    assert cluster[5] == -1
    assert sorted({*cluster.tolist()} - {-1}) == list(range(len(db.meta["clusters"])))
    assert db.meta["map"]["method"] in ("pca", "umap")
    assert any(name.split(" · ")[0] in TOKENIZER.get_vocab() for name in db.meta["clusters"])
    assert density.tolist() == pytest.approx([db.latent(latent).density for latent in range(L)])


def test_of_several_hooks_the_last_is_what_latents_write(source: MappedSource, tmp_path: Path) -> None:
    x = torch.randn(200, 2 * D, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "rows.npy", x.numpy())
    sae = SAE(SAEConfig(d_in=2 * D, n_latents=L, k=4, crosscode_widths=(D, D)), seed=0).requires_grad_(False)
    db = built(sae, opened(tmp_path / "rows.npy"), tmp_path)
    unit = torch.nn.functional.normalize(sae.W_dec[:, D:], dim=1)
    best = (unit @ unit.T).fill_diagonal_(-2).max(1)
    assert [db.neighbours(latent)[0].latent for latent in range(L)] == best.indices.tolist()
    assert db.meta["logits"]["where"] == "the last of 2 hooks"
    assert db.meta["sae"]["architecture"] == "crosscoder over topk"


def test_latents_that_fire_together(source: MappedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saefast.latents.spool.Spool.ranges.__defaults__", (500, 11))
    sae = made(activation="jumprelu")
    # Two pairs that always do.
    sae.W_enc[21], sae.W_enc[22] = sae.W_enc[3], sae.W_enc[4]
    db = built(sae, source, tmp_path)
    on = (sae.encode(all_rows(source)[0]).numpy() > 0).astype(int)
    both, fired = on.T @ on, on.sum(0)
    found = [(latent, other) for latent in range(L) for other in db.cofiring(latent)]
    assert {(3, 21), (21, 3), (4, 22), (22, 4)} <= {(latent, other.latent) for latent, other in found}
    for latent, other in found:
        assert other.n == both[latent, other.latent]
        assert other.value == pytest.approx(other.n * len(on) / fired[latent] / fired[other.latent], rel=1e-5)


def test_tokens_that_latents_raise_and_lower(source: MappedSource, tmp_path: Path) -> None:
    sae, model = made(), tiny_models.model("bert")
    db = built(sae, source, tmp_path, model=model)
    assert (db.meta["logits"]["what"], db.meta["logits"]["why"]) == ("embedding", None)
    vectors = model.get_input_embeddings().weight.detach()
    cosines = torch.nn.functional.cosine_similarity(sae.W_dec[:, None], vectors[None], dim=2)
    for latent in range(L):
        for side, found in zip((1, -1), db.logit_weights(latent), strict=True):
            best = (side * cosines[latent]).topk(10)
            assert [weight.token for weight in found] == best.indices.tolist()
            assert [weight.value for weight in found] == pytest.approx((side * best.values).tolist(), abs=1e-5)
    assert built(sae, source, tmp_path).meta["logits"] == {
        "what": None,
        "why": "the model was not at hand",
        "where": "",
    }


def test_what_the_file_says_of_itself(source: MappedSource, tmp_path: Path) -> None:
    sae = made()
    meta = built(sae, source, tmp_path, rows=100).meta
    facts = {"n_latents": L, "n_rows": 100, "kind": "text", "unit": "tokens"}
    assert facts.items() <= meta.items()
    assert meta["l0"] == pytest.approx(float((sae.encode(all_rows(source)[0][:100]) > 0).sum(1).float().mean()))
    assert meta["sae"]["digest"] == Stack([Part(sae)]).digest()
    assert (meta["sae"]["architecture"], meta["sae"]["d_in"], meta["sae"]["k"]) == ("topk", D, 4)
    assert (meta["rows"]["rows"], meta["rows"]["available"]) == (100, len(all_rows(source)[0]))
    assert "The score is F1" in meta["score"]
    assert "cosine is left out" in meta["score"]


def word(_: Any, token: int) -> str:
    """A word of letters, which the tokenizer's are not."""
    return chr(ord("a") + token % 26) + chr(ord("a") + token // 26) + "word"


def test_the_embedding_is_a_part_of_the_score(
    source: MappedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saefast.harvest.token_text.Texts.token", word)
    plain, told = built(made(), source, tmp_path), built(made(), source, tmp_path, model=tiny_models.model("bert"))
    assert "cosine is left out" not in told.meta["score"]
    pairs = [(plain.latent(latent).score or 0, told.latent(latent).score or 0) for latent in range(L)]
    assert all(other <= one + 1e-12 for one, other in pairs)
    assert any(other < one for one, other in pairs)
    other = tiny_models.model("bert")
    other.resize_token_embeddings(9)
    with pytest.raises(InputError, match=r"has the token \d+, and the model's input embedding 9 rows"):
        built(made(), source, tmp_path, model=other)


def test_the_telling_are_ranked(source: MappedSource, tmp_path: Path) -> None:
    db = built(made(), source, tmp_path)
    chosen = db.telling()
    assert 0 < len(chosen) < L
    own = [{t.token for t in db.tokens_of(latent) if t.own} for latent in chosen]
    assert sum(map(len, own)) == len(set().union(*own))


def test_rows_without_text_have_all_but_tokens(tmp_path: Path) -> None:
    x = torch.randn(300, D, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "rows.npy", x.numpy())
    sae = made()
    db = built(sae, opened(tmp_path / "rows.npy"), tmp_path)
    # The last 15 are held out, and read first.
    check_latents(db, sae.encode(torch.cat([x[-15:], x[:-15]])).numpy())
    assert (db.meta["kind"], db.meta["unit"], db.meta["n_sequences"]) == ("rows", "rows", 0)
    assert (db.meta["score"], db.meta["tokenizer"], db.telling()) == (None, None, [])
    assert {row.score for row in db.page()[0]} == {None}
    assert all(len(db.neighbours(latent)) == 10 for latent in range(L))
    assert db.query("SELECT count(*) FROM sequences") == db.query("SELECT count(*) FROM codes") == [(0,)]


def test_a_residual_sae_is_told_of_what_it_encodes(source: MappedSource, tmp_path: Path) -> None:
    first, second = made(), made(seed=1)
    stack = Stack([Part(first), Part(second, "error")])
    db = built(stack, source, tmp_path)
    x = all_rows(source)[0]
    check_latents(db, second.encode(x - first(x).x_hat).numpy())
    assert db.meta["sae"]["digest"] == stack.digest()


def test_labels_stay_with_the_weights_that_they_were_written_for(source: MappedSource, tmp_path: Path) -> None:
    db = built(made(), source, tmp_path)
    db.write_label(3, "bridges")
    db.write_label(39, "rivers")
    again = built(made(), source, tmp_path)
    assert again.label_of(3) is not None
    assert again.label_of(3)[::2] == ("bridges", True)  # type: ignore[index]
    other = built(made(seed=1), source, tmp_path)
    assert other.label_of(3)[::2] == ("bridges", False)  # type: ignore[index]
    with pytest.warns(RuntimeWarning, match="1 labels of latents from 20 on are left out"):
        smaller = built(made(n_latents=20), source, tmp_path)
    assert smaller.label_of(3) is not None


class Stopped(BaseException):
    """As KeyboardInterrupt, which pytest would take for its own."""


@pytest.mark.parametrize("step", ["encoding", "contexts", "codes", "latents", "scores", "neighbours", "indexes"])
def test_stopped_at_any_step_the_file_is_as_it_was(step: str, source: MappedSource, tmp_path: Path) -> None:
    def stop(now: str, share: float) -> None:
        if now == step:
            raise Stopped

    with pytest.raises(Stopped):
        built(made(), source, tmp_path, progress=stop)
    assert list(tmp_path.iterdir()) == []
    built(made(), source, tmp_path).write_label(3, "kept")
    before = (tmp_path / "latents.db").read_bytes()
    with pytest.raises(Stopped):
        built(made(seed=1), source, tmp_path, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["latents.db"]
    assert (tmp_path / "latents.db").read_bytes() == before


def test_a_long_statement_is_left_when_the_process_is_to_end(
    source: MappedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()

    def interrupt() -> None:
        begun.wait(HANG)
        os.kill(os.getpid(), signal.SIGINT)

    def noted(path: Path) -> sqlite3.Connection:
        db = schema.create(path)
        db.create_function("begun", 0, begun.set)
        return db

    monkeypatch.setattr(build, "_INSTRUCTIONS", 1000)
    monkeypatch.setattr(build, "create", noted)
    endless = "WITH RECURSIVE n (i) AS (SELECT begun() UNION ALL SELECT 1 FROM n) SELECT count(*) FROM n;"
    monkeypatch.setattr(schema, "INDEXES", endless)
    other = threading.Thread(target=interrupt)
    other.start()
    with pytest.raises(KeyboardInterrupt):
        built(made(), source, tmp_path)
    other.join()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_of_the_disk(
    source: MappedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(path: Path) -> sqlite3.Connection:
        db = schema.create(path)
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {pages + 2}")  # a disk with so much room
        return db

    monkeypatch.setattr(build, "create", small)
    with pytest.raises(OSError, match="no space left") as found:
        built(made(), source, tmp_path)
    assert found.value.errno == 28
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_kept_aside_and_another_programs_is_left(source: MappedSource, tmp_path: Path) -> None:
    file = tmp_path / "latents.db"
    file.write_bytes(b"no database at all" * 100)
    with pytest.warns(RuntimeWarning, match=r"was damaged .* and is kept as latents\.db\.damaged"):
        assert built(made(), source, tmp_path).n_latents == L
    assert (tmp_path / "latents.db.damaged").read_bytes().startswith(b"no database")
    file.unlink()
    with sqlite3.connect(file) as db:
        db.execute("CREATE TABLE labels (mine)")
    before = file.read_bytes()
    with pytest.raises(InputError, match="another program's SQLite file: move it away"):
        built(made(), source, tmp_path)
    assert file.read_bytes() == before


@pytest.mark.parametrize("rows", [0, -3])
def test_no_rows_are_refused(rows: int, source: MappedSource, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"rows is {rows}: expected at least 1"):
        built(made(), source, tmp_path, rows=rows)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_not_finite_are_named(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((100, D)).astype(np.float32)
    x[3, 2] = np.nan
    np.save(tmp_path / "rows.npy", x)
    with pytest.raises(InputError, match="row 8 holds NaN or inf"):  # after the 5 held out
        built(made(), opened(tmp_path / "rows.npy"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]
