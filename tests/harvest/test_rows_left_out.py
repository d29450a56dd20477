"""Which rows a harvest keeps: finite ones, ordinary ones by one median, and not those of tokens that are excluded."""

import json
import warnings

import numpy as np
import pytest
import tiny_models
import torch
from batches import xs

from saefast.cli.args import parse
from saefast.cli.harvest import HarvestArgs, describe, harvest_config
from saefast.data.shards import ShardFolder
from saefast.errors import InputError
from saefast.files import SEAL
from saefast.harvest import harvester, sequences
from saefast.harvest import kept as kept_module
from saefast.harvest.kept import DROPPED, TokenChoice, token_ids
from saefast.harvest.live import live_sources
from saefast.harvest.to_disk import HarvestConfig, harvest, harvest_batches

CONFIG = dict(hooks=("layers.0",), ctx_len=16, dtype="float32", heldout=0.0, device="cpu")
TEXTS = tiny_models.documents(60)


def places(folder, hook=None):
    """Each row by its sequence and position."""
    found = {}
    for split in ("train", "heldout"):
        for info in folder.shards(split, hook):
            shard = folder.open(info, hook)
            for seq, pos, row in zip(shard.seq.tolist(), shard.pos.tolist(), shard.acts, strict=True):
                found[seq, pos] = row.clone()
    return found


def embedding(model):
    return model.get_input_embeddings().weight


def sink_model():
    """A GPT-2 whose first position is a sink."""
    model = tiny_models.model("gpt2")
    with torch.no_grad():
        model.wpe.weight[0] *= 2000
    return model


# --- one median


def test_batch_tokens_change_no_row_that_is_kept(tmp_path):
    """Short documents beside long ones: among themselves their first, and only, tokens look ordinary."""
    texts = [*TEXTS, *[f"w{i % 60}" for i in range(208)]]
    given = dict(model=sink_model(), tokenizer=tiny_models.tokenizer(special=False), text=texts, progress=False)
    found, indices = [], []
    for batch_tokens in (8192, 64):
        folder = tmp_path / str(batch_tokens)
        config = HarvestConfig(**CONFIG, max_norm_multiple=10.0, batch_tokens=batch_tokens)
        report = harvest(folder, config, **given)
        found.append(places(ShardFolder(folder)))
        indices.append(ShardFolder(folder).index)
        assert report.dropped["outlier_norm"] == report.sequences
    assert found[0].keys() == found[1].keys()
    assert all(pos > 0 for _, pos in found[0])
    # "auto" is 10.
    harvest(tmp_path / "auto", HarvestConfig(**CONFIG, max_norm_multiple="auto"), **given)
    assert places(ShardFolder(tmp_path / "auto")).keys() == found[0].keys()
    assert indices[0]["median_norms"]["layers.0"] == pytest.approx(indices[1]["median_norms"]["layers.0"], rel=1e-5)


def test_a_harvest_that_goes_on_keeps_its_median(tmp_path, monkeypatch):
    monkeypatch.setattr(sequences, "WINDOW_CHARS", 800)
    monkeypatch.setattr(harvester, "NORM_TOKENS", 100)
    given = dict(model=sink_model(), tokenizer=tiny_models.tokenizer(special=False), text=TEXTS, progress=False)
    settings = dict(CONFIG, max_norm_multiple=1.02)
    harvest(tmp_path / "whole", HarvestConfig(**settings), **given)
    harvest(tmp_path / "cut", HarvestConfig(**settings, max_tokens=300), **given)
    median = ShardFolder(tmp_path / "cut").index["median_norms"]
    assert median == ShardFolder(tmp_path / "whole").index["median_norms"]
    assert harvest(tmp_path / "cut", HarvestConfig(**settings), **given).dropped["outlier_norm"] > 0
    assert ShardFolder(tmp_path / "cut").index["median_norms"] == median
    assert places(ShardFolder(tmp_path / "cut")).keys() == places(ShardFolder(tmp_path / "whole")).keys()


def test_a_folder_of_batches_medians_is_not_gone_on_with(tmp_path):
    given = dict(model=sink_model(), tokenizer=tiny_models.tokenizer(special=False), text=TEXTS, progress=False)
    settings = dict(CONFIG, max_norm_multiple=10.0)
    harvest(tmp_path, HarvestConfig(**settings, max_tokens=300), **given)
    forget(tmp_path, "median_norms")
    with pytest.raises(InputError, match="went by each batch's median norm") as error:
        harvest(tmp_path, HarvestConfig(**settings), **given)
    assert "\n" not in str(error.value)


def forget(folder, name):
    """Takes a fact out of index.json, as a version that did not know of it leaves it."""
    path = folder / "index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    del index[name], index[SEAL]
    path.write_text(json.dumps(index), encoding="utf-8")


def test_a_text_without_a_row_at_its_beginning_has_no_median():
    config = HarvestConfig(**CONFIG, max_norm_multiple=2.0, exclude_tokens=("w1",))
    with pytest.raises(InputError, match=r"no row is kept of the first 2 tokens of the given text to take the median"):
        next(
            harvest_batches(config, model=sink_model(), tokenizer=tiny_models.tokenizer(special=False), text=["w1 w1"])
        )


# --- not finite


def massive(model, factor):
    """One token with a massive activation."""
    with torch.no_grad():
        embedding(model)[tiny_models.tokenizer().get_vocab()["w7"]] *= factor
    return model


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "int8"])
def test_rows_beyond_the_stored_dtype_are_dropped_and_counted(tmp_path, stored):
    model = massive(tiny_models.model("llama"), 4e7)
    given = dict(model=model, tokenizer=tiny_models.tokenizer(special=False), text=TEXTS, progress=False)
    config = HarvestConfig(**{**CONFIG, "hooks": ("embed_tokens", "layers.2"), "dtype": stored})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = harvest(tmp_path, config, **given)
    said = [str(w.message) for w in said if w.category is RuntimeWarning]
    n = sum(text.split().count("w7") for text in TEXTS)
    folder = ShardFolder(tmp_path)
    if stored == "float16":
        assert report.dropped["not_finite"] == folder.index["dropped"]["not_finite"] == n > 10
        (line,) = said
        assert "'embed_tokens' has values beyond what float16 holds" in line
        assert "bfloat16 or float32 (dtype)" in line
        assert f"{n:,} not finite" in describe(report)
    else:
        assert (report.dropped["not_finite"], said) == (0, [])
        assert "not finite" not in describe(report)
    assert report.rows + n * (stored == "float16") == report.tokens
    rows = {hook: places(folder, hook) for hook in folder.hooks}
    assert rows["embed_tokens"].keys() == rows["layers.2"].keys()
    assert all(row.isfinite().all() for found in rows.values() for row in found.values())
    for batch in harvest_batches(config, **{key: given[key] for key in ("model", "tokenizer", "text")}):
        for seq, pos, row in zip(batch.seq.tolist(), batch.pos.tolist(), batch.rows["layers.2"], strict=True):
            if stored != "int8" and (seq, pos) in rows["layers.2"]:
                assert torch.equal(rows["layers.2"][seq, pos], row.to(getattr(torch, stored)))


@pytest.mark.parametrize("live", [False, True])
def test_rows_that_the_model_itself_overflows_are_left_out_of_live_training_too(tmp_path, live):
    """In float16, past 65504; the rows of other tokens see them through attention and may be NaN, so at layer 0."""
    model = massive(tiny_models.model("llama"), 1e7).half()
    given = dict(model=model, tokenizer=tiny_models.tokenizer(special=False), text=TEXTS)
    config = HarvestConfig(**{**CONFIG, "hooks": ("embed_tokens",)})

    def rows_of():
        if not live:
            report = harvest(tmp_path, config, **given, progress=False)
            assert report.dropped["not_finite"] == sum(text.split().count("w7") for text in TEXTS)
            return torch.stack([*places(ShardFolder(tmp_path)).values()])
        source = live_sources(config, **given, reservoir_rows=1)["embed_tokens"]
        rows = torch.cat(xs(source.batches(8), 40))
        source.close()
        return rows

    message = r"'embed_tokens' gives NaN or inf in float16 .*bfloat16 or float32 \(forward"
    with pytest.warns(RuntimeWarning, match=message):
        rows = rows_of()
    assert rows.isfinite().all()


def test_where_every_row_is_finite_the_limits_of_a_dtype_are_exact():
    largest = torch.tensor([[65504.0, 1.0], [-65519.0, 0.0], [65520.0, 0.0], [0.0, -65520.0], [float("nan"), 1.0]])
    finite, first = kept_module.finite_rows({"h": largest}, torch.float16)
    assert finite.tolist() == largest.half().isfinite().all(1).tolist() == [True, True, False, False, False]
    assert first == ("h", True, 2)
    finite, first = kept_module.finite_rows({"g": torch.zeros(5, 2), "h": largest}, None)
    assert finite.tolist() == [True] * 4 + [False]
    assert first == ("h", False, 4)


# --- tokens and positions


def test_excluded_tokens_have_no_rows(tmp_path):
    tokenizer = tiny_models.tokenizer()
    given = dict(model=tiny_models.model("gpt2"), tokenizer=tokenizer, text=TEXTS, progress=False)
    harvest(tmp_path / "all", HarvestConfig(**CONFIG), **given)
    config = HarvestConfig(**CONFIG, exclude_tokens=("w3", 9, "w3"))
    report = harvest(tmp_path / "some", config, **given)
    folder = ShardFolder(tmp_path / "some")
    whole, some = places(ShardFolder(tmp_path / "all")), places(folder)
    ids = {"w3": tokenizer.get_vocab()["w3"], "w4": 9}
    assert tokenizer.get_vocab()["w4"] == 9
    expected = {place for place in whole if int(folder.tokens(place[0])[place[1]]) not in ids.values()}
    assert some.keys() == expected
    assert all(torch.equal(some[place], whole[place]) for place in some)
    assert report.dropped["excluded"] == len(whole) - len(some) > 0
    assert folder.index["excluded_ids"] == sorted(ids.values())
    assert folder.index["special_ids"] == sorted(tokenizer.all_special_ids)
    # Going on is with the same tokens.
    assert harvest(tmp_path / "some", config, **given).tokens == 0
    with pytest.raises(InputError, match=r"was begun with exclude_tokens = \['w3', 9, 'w3'\], now None is asked for"):
        harvest(tmp_path / "some", HarvestConfig(**CONFIG), **given)
    with pytest.raises(InputError, match=r"was begun with exclude_tokens = None, now \['w3'\] is asked for"):
        harvest(tmp_path / "all", HarvestConfig(**CONFIG, exclude_tokens=("w3",)), **given)


def test_a_token_is_an_id_a_name_or_a_text():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    newline = tokenizer.get_vocab()["Ċ"]
    assert token_ids(tokenizer, ["\n", "Ċ", newline, "<eos>"]) == [0, newline]
    with pytest.raises(InputError, match=r"names 'fox', which is no token of this tokenizer but 'f' 'o' 'x': name a t"):
        token_ids(tokenizer, ["fox"])
    with pytest.raises(InputError, match="names '', which is no token of this tokenizer but nothing"):
        token_ids(tokenizer, [""])
    with pytest.raises(InputError, match=rf"names {len(tokenizer)}: expected ids of tokens, 0 to {len(tokenizer) - 1}"):
        token_ids(tokenizer, [len(tokenizer)])
    with pytest.raises(InputError, match=r"names 'nonsense', which is no token of this tokenizer but '\[UNK\]'"):
        token_ids(tiny_models.tokenizer(), ["nonsense"])
    with pytest.raises(InputError, match="exclude_tokens is "):
        HarvestConfig(exclude_tokens=(1.5,))
    flags = ["--out", "x", "--exclude-tokens", "13", "w3", "<s>", "--drop-first", "1", "--max-norm-multiple", "auto"]
    config, _ = harvest_config(parse(HarvestArgs, flags, "harvest"))
    assert (config.exclude_tokens, config.drop_first) == ((13, "w3", "<s>"), 1)
    assert config.max_norm_multiple == "auto"


def test_the_first_tokens_of_a_sequence_can_be_left_out(tmp_path):
    for special, keep in ((True, False), (True, True), (False, False)):
        folder = tmp_path / f"{special}{keep}"
        config = HarvestConfig(**CONFIG, drop_first=2, keep_special_tokens=keep)
        given = dict(model=tiny_models.model("gpt2"), tokenizer=tiny_models.tokenizer(special=special), text=TEXTS)
        report = harvest(folder, config, **given, progress=False)
        found = ShardFolder(folder)
        begin = 1 if special else 0
        expected = set()
        for seq in range(found.n_sequences):
            ids = found.tokens(seq).tolist()
            text = range(begin + 2, len(ids) - begin)
            expected |= {(seq, pos) for pos in text}
            if keep:
                expected |= {(seq, 0)} | ({(seq, len(ids) - 1)} if len(ids) > 3 else set())
        assert places(found).keys() == expected
        assert report.dropped["excluded"] > found.n_sequences
        assert report.rows + report.dropped["excluded"] + report.dropped["special"] == report.tokens
    with pytest.raises(InputError, match="drop_first is -1, expected at least 0"):
        harvest(tmp_path / "x", HarvestConfig(**CONFIG, drop_first=-1), **given)


def test_what_an_index_keeps_is_the_same_choice(tmp_path):
    given = dict(model=tiny_models.model("gpt2"), tokenizer=tiny_models.tokenizer(), text=TEXTS, progress=False)
    harvest(tmp_path, HarvestConfig(**CONFIG, drop_first=1, exclude_tokens=("w3",)), **given)
    folder = ShardFolder(tmp_path)
    choice = TokenChoice.from_index(folder.index)
    kept = set()
    for seq in range(folder.n_sequences):
        ids = folder.tokens(seq).numpy()[None]
        kept |= {(seq, int(pos)) for pos in np.flatnonzero(choice(ids, np.ones_like(ids, dtype=bool))[1])}
    assert kept == places(folder).keys()


def test_a_sink_at_position_0_is_said_where_no_bos_stands(tmp_path):
    plain = tiny_models.tokenizer(special=False)
    config = dict(CONFIG)

    def said(model, **changes):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            options = {"model": model, "tokenizer": plain, "text": TEXTS}
            list(harvest_batches(HarvestConfig(**config | changes), **options))
        return [str(w.message) for w in found if w.category is RuntimeWarning]

    (line,) = said(sink_model())
    assert "at position 0 rows have" in line
    assert "drop_first=1" in line
    assert "prepend_bos=True" in line
    assert said(tiny_models.model("gpt2")) == []
    for mended in (dict(prepend_bos=True), dict(drop_first=1), dict(max_norm_multiple="auto")):
        assert said(sink_model(), **mended) == []


def test_reasons_have_one_order():
    assert DROPPED == ("special", "excluded", "padding", "not_finite", "outlier_norm")
