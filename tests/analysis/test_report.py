"""Top examples and token tables against brute force; the choice of latents; the page, the table and the pictures."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor

from saefast.analysis.feature_table import (
    Feature,
    FeatureTable,
    Snippet,
    Texts,
    TokenShare,
    choose,
    make_table,
    own_tokens,
    same_word,
)
from saefast.analysis.features import LatentStats, PairSums, TopExamples, collect
from saefast.analysis.plots import draw_curves, draw_density, draw_features
from saefast.analysis.report import to_html, to_markdown, write_features
from saefast.data.mapped_source import Located, MappedSource
from saefast.data.opening import open_source
from saefast.errors import InputError
from saefast.harvest.to_disk import HarvestConfig, harvest
from saefast.metrics.streaming import Sparsity
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

PNG = b"\x89PNG\r\n\x1a\n"
L, K, V = 30, 4, 17


def code(n: int) -> tuple[Tensor, Tensor]:
    idx = torch.rand(n, L).argsort(1)[:, :K].int()
    acts = torch.rand(n, K)
    acts[torch.rand(n, K) < 0.2] = 0
    return acts, idx


@pytest.mark.parametrize("size", [400, 37])
def test_top_examples_are_those_of_the_dense_code(size: int) -> None:
    acts, idx = code(400)
    top = TopExamples(L, n=6)
    for part in torch.arange(400).split(size):
        top.update(acts[part], idx[part], part * 10)
    dense = torch.zeros(400, L).scatter(1, idx.long(), acts)
    best = dense.topk(6, dim=0)
    assert torch.equal(top.acts, best.values.T)
    assert torch.equal(top.places, torch.where(best.values.T > 0, best.indices.T * 10, -1))


def test_a_latent_with_few_firings_leaves_places_empty() -> None:
    top = TopExamples(3, n=4)
    top.update(
        torch.tensor([[0.5, 0.0], [0.7, 0.0]]), torch.tensor([[1, 0], [1, 2]], dtype=torch.int32), torch.tensor([8, 9])
    )
    assert top.places.tolist() == [[-1] * 4, [9, 8, -1, -1], [-1] * 4]
    assert top.acts[1].tolist() == pytest.approx([0.7, 0.5, 0, 0])


def test_pairs_of_latent_and_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saefast.analysis.features._PENDING", 100)  # so that sums are taken in several goes
    acts, idx = code(300)
    tokens = torch.randint(0, V, (300,))
    pairs = PairSums(V)
    for part in torch.arange(300).split(29):
        pairs.update(acts[part], idx[part], tokens[part])
    pairs.close()
    sums, counts = torch.zeros(L, V, dtype=torch.float64), torch.zeros(L, V, dtype=torch.int64)
    for b in range(300):
        for a, i in zip(acts[b].tolist(), idx[b].tolist(), strict=True):
            if a > 0:
                sums[i, tokens[b]] += a
                counts[i, tokens[b]] += 1
    assert torch.equal(torch.stack([pairs.latents, pairs.tokens]), counts.nonzero().T)
    assert torch.equal(pairs.counts, counts[counts > 0])
    torch.testing.assert_close(pairs.sums, sums[counts > 0])


def planted(words: dict[int, list[int]], n: int = 4000) -> LatentStats:
    """A code in which latent l fires on just the tokens words[l], strongest on the first; token 0 has none."""
    tokens = torch.randint(0, V, (n,))
    acts, idx = torch.zeros(n, 2), torch.tensor([[0, 1]]).repeat(n, 1)
    for latent, own in words.items():
        for strength, token in enumerate(reversed(own), start=2):
            acts[tokens == token, 0] = float(strength) + 0.01 * latent
            idx[tokens == token, 0] = latent
    stats = LatentStats(Sparsity(L), TopExamples(L, 8), PairSums(V), torch.bincount(tokens, minlength=V))
    stats.sparsity.update(acts, idx.int())
    stats.top.update(acts, idx.int(), torch.arange(n))
    stats.pairs.update(acts, idx.int(), tokens)
    stats.pairs.close()
    return stats


def test_own_tokens_and_f1_of_a_planted_latent() -> None:
    tokens = own_tokens(planted({5: [3, 4, 7], 9: [11]}))
    assert set(tokens.ids[5][tokens.own[5]].tolist()) == {3, 4, 7}
    assert tokens.ids[5, 0] == 3  # the strongest first
    assert tokens.ids[9][tokens.own[9]].tolist() == [11]
    assert tokens.f1[5] == pytest.approx(1)
    assert tokens.covered[5][:3].tolist() == pytest.approx([1, 1, 1])
    assert tokens.share[5].sum() == pytest.approx(1)
    assert not tokens.own[6].any()


class Words:
    """Token 2i and 2i + 1 are two words; stands in for Texts."""

    def n_words(self, tokens: list[int]) -> int:
        return len(tokens)


def test_the_choice_prefers_families_and_takes_no_token_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saefast.analysis.feature_table.MOST_DENSE", 0.4)
    stats = planted({5: [3, 4, 7], 9: [11], 12: [13, 14, 15, 16], 3: [8, 9]})
    chosen = choose(stats, Words(), n=10)  # type: ignore[arg-type]
    assert [latent for latent, _ in chosen][:2] == [12, 5]
    assert {latent for latent, _ in chosen} == {12, 5, 9, 3}
    embedding = torch.eye(V)
    embedding[[3, 4, 7]] = torch.tensor([[1.0] * V, [1.0] * V, [1.1] * V])
    # Tokens that are alike to the model come before more tokens that are not.
    assert choose(stats, Words(), n=1, embedding=embedding)[0][0] == 5  # type: ignore[arg-type]


def test_forms_of_a_word() -> None:
    assert same_word("raise", "Raised")
    assert same_word("run", "running")
    assert same_word("-ized", "-ize")
    assert not same_word("table", "row")
    assert not same_word("a", "all")


class Bert:
    """A word-piece tokenizer as far as Texts asks."""

    all_special_ids = (0, 1)
    names = ("[CLS]", "[SEP]", "don", "'", "t", "max", "_", "len", "##s", "(", "x", ")", ",", "print")

    def get_vocab(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.names[token]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens).replace(" ##", "")


def test_word_pieces_read_as_text() -> None:
    texts = Texts(Bert())
    ids = [
        Bert.names.index(w)
        for w in ["[CLS]", "don", "'", "t", "print", "max", "_", "len", "##s", "(", "x", ")", ",", "x"]
    ]
    assert "".join(texts.run(ids)) == " don't print max_lens (x), x"
    assert texts.token(8) == "-s"
    assert texts.n_words([7, 8, 5]) == 2  # -s is no word


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("acts")
    config = HarvestConfig(hooks=("layers.1",), ctx_len=24, dtype="float32", heldout=0.2, device="cpu")
    documents = tiny_models.documents(80)
    harvest(
        folder,
        config,
        model=tiny_models.model("bert"),
        tokenizer=tiny_models.tokenizer(),
        text=documents,
        progress=False,
    )
    return folder


def test_table_from_a_harvest(harvested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saefast.analysis.feature_table.MOST_DENSE", 0.5)
    source = open_source(harvested)
    assert isinstance(source, MappedSource)
    assert source.folder is not None
    sae = SAE(SAEConfig(d_in=16, n_latents=40, k=3), seed=0)
    batches = list(source.located("heldout", 64)) + list(source.located("train", 64))
    stats = collect(sae, iter(batches), tokens_of=source.folder.token_ids, vocabulary=66)
    x = torch.cat([b.x for b in batches])
    seq, pos = (torch.cat([getattr(b, name) for b in batches]) for name in ("seq", "pos"))
    dense = sae.encode(x).detach()
    assert torch.equal(stats.sparsity.counts, (dense > 0).sum(0))
    ids = torch.tensor([int(source.folder.tokens(int(s))[int(p)]) for s, p in zip(seq, pos, strict=True)])
    assert torch.equal(stats.token_counts, torch.bincount(ids, minlength=66))
    table = make_table(sae, source, stats, tiny_models.tokenizer(), None, n=5, contexts=3)
    assert table.features
    where = {(int(s), int(p)): row for row, (s, p) in enumerate(zip(seq, pos, strict=True))}
    for feature in table.features:
        strongest = feature.snippets[0]
        assert 1 <= len(feature.snippets) <= 3
        # The peak shown is a firing of this latent, with its own activation, on one of the text's words.
        place = int(stats.top.places[feature.latent, 0])
        act = float(dense[where[place >> 16, place & 0xFFFF], feature.latent])
        assert max(max(s.acts) for s in feature.snippets) == pytest.approx(act, rel=1e-4)
        assert strongest.acts[strongest.peak] == pytest.approx(max(strongest.acts[strongest.peak], 1e-9))
        assert strongest.texts[strongest.peak].strip() in [*tiny_models.WORDS, "a"]
        assert all(a <= feature.max_act * (1 + 1e-5) for s in feature.snippets for a in s.acts)


def table() -> FeatureTable:
    nasty = [" a", "|b", " <script>", " $x_1$", " *done*", " `end`"]
    features = [
        Feature(
            latent=7 + i,
            score=1.5,
            density=0.004,
            n_fired=120,
            max_act=3.0,
            tokens=[
                TokenShare(1, "raise", 0.6, 0.9),
                TokenShare(2, "<error>", 0.2, 1.0),
                TokenShare(3, "raised", 0.1, 1.0),
            ],
            snippets=[Snippet(nasty, [0, 0.5, 3.0, 0, 1.0, 0], 2), Snippet([" y"] * 30, [0.0] * 29 + [2.5], 29)],
        )
        for i in range(3)
    ]
    return FeatureTable(features, "How they were chosen.")


class Checker(HTMLParser):
    """Collects what a browser would fetch, and whether tags match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_escaped() -> None:
    page = to_html(table(), "Title & more")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.fetched == []
    assert not re.search(r"https?:|url\(|@import|<script", page)
    assert "a|b <script> $x_1$ *done* `end`" in checker.text
    assert "raise · <error>" in checker.text
    assert page.count("rgba(255, 159, 28, 0.90)") == 3  # the strongest firing of each latent, at full shade


def test_markdown_rows_stay_rows() -> None:
    lines = to_markdown(table(), "Title").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| latent")]
    assert len(rows) == 3
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)
    assert "**&lt;script&gt;**" in rows[0]


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
    draw_density(torch.tensor([0, 1, 5, 900]), 1000, tmp_path / "c.png", k=2)
    draw_density(torch.zeros(4, dtype=torch.int64), 1000, tmp_path / "d.png", k=2)
    draw_features(table(), tmp_path / "e.png", "title")
    written = sorted(tmp_path.iterdir())
    assert [path.name for path in written] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size > 3000 for path in written)


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'saefast\[demo\]'"):
        draw_curves(curves(), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_two_pages_of_features(tmp_path: Path) -> None:
    written = write_features(tmp_path, table(), "Title")
    assert [path.name for path in written] == ["features.html", "features.md"]
    assert all(path.is_file() for path in written)


def test_batches_without_places_still_count() -> None:
    sae = SAE(SAEConfig(d_in=6, n_latents=12, k=2), seed=0)
    stats = collect(sae, [Located(torch.randn(9, 6), None, None)])
    assert 0 < int(stats.sparsity.counts.sum()) <= 18
    assert stats.sparsity.n_rows == 9
    assert bool((stats.top.places == -1).all())
