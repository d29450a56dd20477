"""Evaluation and features are of the model that was harvested, not of one that its name leads to."""

import copy
import json
import warnings

import pytest
import tiny_models
import torch

from saefast.analysis.evaluation import evaluate_run
from saefast.cli import main as cli
from saefast.cli.features import FeaturesArgs, run_features
from saefast.data.opening import open_source
from saefast.data.provenance import describe_data, recorded_data
from saefast.data.shards import ShardFolder
from saefast.errors import InputError
from saefast.files import SEAL
from saefast.harvest import reader, reharvest
from saefast.harvest.identity import identity_of
from saefast.harvest.language_models import load_model, load_tokenizer
from saefast.harvest.live import live_source, live_sources
from saefast.harvest.to_disk import HarvestConfig, harvest
from saefast.latents.database import LatentsDB
from saefast.latents.facts import WITHOUT_COSINE
from saefast.latents.schema import LATENTS_DB
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, load

CONFIG = dict(hooks=("layers.1",), ctx_len=24, dtype="float32", forward="float32", heldout=0.3, device="cpu")
TEXTS = tiny_models.documents(60)
LAYERS = dict(hook=None, key=None, heldout=0.3)


def make_run(run, data, metadata=None):
    metadata = metadata or describe_data(data, run, open_source(data), **LAYERS)
    SAE(SAEConfig(d_in=16, n_latents=48, k=4, metadata=metadata), seed=0).save(run)
    return run


def trained(model, tokenizer, steps=4):
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for text in TEXTS * steps:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        if ids.shape[1] > 1:
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A parent in a folder, a child loaded from it and trained on, also saved, and a run on the child's rows."""
    folder = tmp_path_factory.mktemp("family")
    tokenizer = tiny_models.tokenizer(special=False)
    tiny_models.model("llama", head=True).save_pretrained(folder / "parent")
    tokenizer.save_pretrained(folder / "parent")
    parent = load_model(folder / "parent", head="AutoModelForCausalLM").requires_grad_(True)
    child = trained(parent, tokenizer)
    child.save_pretrained(folder / "child")
    tokenizer.save_pretrained(folder / "child")
    harvest(folder / "acts", HarvestConfig(**CONFIG), model=child, tokenizer=tokenizer, text=TEXTS, progress=False)
    assert ShardFolder(folder / "acts").index["model"] == str(folder / "parent")
    return folder, parent, child, tokenizer, make_run(folder / "run", folder / "acts")


def clean_loss(model, folder):
    """Cross-entropy over the held-out sequences, by hand."""
    held = {int(seq) for info in folder.shards("heldout") for seq in folder.open(info).seq}
    total, n = 0.0, 0
    for seq in sorted(held):
        ids = folder.tokens(seq).long()[None]
        with torch.no_grad():
            loss = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        total, n = total - float(loss.sum()), n + loss.numel()
    return total / n


def test_the_parent_is_not_taken_for_its_child(family):
    folder, parent, child, _, run = family
    result = evaluate_run(run)
    assert result.lm == {}
    assert result.lm_left_out.startswith(f"{folder / 'parent'} is not the model that was harvested: its weights")
    assert "model= or --model" in result.lm_left_out
    assert json.loads((run / "eval.json").read_text(encoding="utf-8"))["lm_left_out"] == result.lm_left_out
    acts = ShardFolder(folder / "acts")
    assert clean_loss(parent, acts) > clean_loss(child, acts) + 0.1
    for model in (child, folder / "child", str(folder / "child")):
        given = evaluate_run(run, model=model, write=False)
        assert given.lm["ce_clean"] == pytest.approx(clean_loss(child, acts), rel=1e-5)
        assert given.metrics == result.metrics
    for model in (parent, folder / "parent"):
        with pytest.raises(InputError, match="is not the model that was harvested: its weights are others") as error:
            evaluate_run(run, model=model, write=False)
        assert "\n" not in str(error.value)


def test_the_command_line_takes_the_model(family, capsys):
    folder, _, child, _, run = family
    assert cli.main(["eval", str(run)]) == 0
    assert "language-model loss left out: " in capsys.readouterr().out
    assert cli.main(["eval", str(run), "--model", str(folder / "child")]) == 0
    ce = next(line for line in capsys.readouterr().out.splitlines() if " ce_clean " in line)
    assert float(ce.split()[1]) == pytest.approx(clean_loss(child, ShardFolder(folder / "acts")), rel=1e-3)
    for command in ("eval", "features"):
        assert cli.main([command, str(run), "--model", str(folder / "parent")]) == 2
        assert "parent is not the model that was harvested" in capsys.readouterr().err


def test_features_do_without_another_models_embedding(family, capsys):
    folder, _, child, tokenizer, run = family
    path, asked = run / LATENTS_DB, FeaturesArgs(run=run, top=3)
    for given in (dict(model=child), dict(model=child, tokenizer=tokenizer), dict(model=folder / "child")):
        path.unlink(missing_ok=True)
        with pytest.warns(RuntimeWarning, match="described without the model: .*parent is not the mod"):
            run_features(asked)
        assert WITHOUT_COSINE in LatentsDB(path).meta["score"]
        # Made anew, because the model is there now.
        run_features(asked, **given)
        assert WITHOUT_COSINE not in LatentsDB(path).meta["score"]
        assert LatentsDB(path).meta["logits"]["what"] == "logit"
    other = tiny_models.tokenizer()
    with pytest.raises(InputError, match="is not the tokenizer that was harvested: its tokenizer is another"):
        run_features(asked, tokenizer=other)
    other.save_pretrained(folder / "parent")
    path.unlink()
    try:
        with pytest.raises(InputError, match=r"parent is not the tokenizer that was harvested.*tokenizer= or --model"):
            run_features(asked)
    finally:
        tokenizer.save_pretrained(folder / "parent")


def test_given_models_of_other_kinds(family):
    _, _, child, _, run = family
    assert "is a LlamaModel, which has no language-model head" in evaluate_run(run, model=child.model).lm_left_out
    with pytest.raises(InputError, match="its weights are bfloat16, those harvested from were float32"):
        evaluate_run(run, model=copy.deepcopy(child).bfloat16())
    with pytest.raises(InputError, match=r"its weights have other names \(h\.0, not layers\.0\)"):
        evaluate_run(run, model=tiny_models.model("gpt2", head=True))
    with pytest.raises(InputError, match="tokenizer is a int: expected the one that belongs to the model"):
        evaluate_run(run, tokenizer=5)
    for model in (5, object()):
        assert (
            "which has no language-model head" in evaluate_run(run, model=model, lm_tokens=64, write=False).lm_left_out
        )
        with pytest.raises(InputError, match="expected a model of transformers, a folder or a name"):
            run_features(FeaturesArgs(run=run, top=3), model=model)
    again = evaluate_run(run, model=torch.compile(child, backend="eager"), lm_tokens=64)
    assert again.lm["ce_clean"] > 0


def test_a_harvest_of_before_is_evaluated_with_a_word(family, tmp_path):
    folder, parent, child, tokenizer, _ = family
    harvest(tmp_path / "acts", HarvestConfig(**CONFIG), model=child, tokenizer=tokenizer, text=TEXTS, progress=False)
    path = tmp_path / "acts" / "index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    for name in ("identity", "special_ids", "excluded_ids", SEAL):
        del index[name]
    path.write_text(json.dumps(index), encoding="utf-8")
    run = make_run(tmp_path / "run", tmp_path / "acts")
    with pytest.warns(RuntimeWarning, match=r"whether .*parent is the model that was harvested is not known"):
        result = evaluate_run(run)
    assert result.lm["ce_clean"] == pytest.approx(clean_loss(parent, ShardFolder(folder / "acts")), rel=1e-5)


# --- the same tokens as in the harvest


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [({}, []), (dict(exclude_tokens=("w3", "w5")), ["w3", "w5"]), (dict(drop_first=2), [])],
    ids=["all", "excluded", "first"],
)
def test_tokens_without_rows_keep_their_activations(family, tmp_path, settings, left_out):
    _, _, child, tokenizer, _ = family
    config = HarvestConfig(**CONFIG, **settings)
    harvest(tmp_path / "acts", config, model=child, tokenizer=tokenizer, text=TEXTS, progress=False)
    folder = ShardFolder(tmp_path / "acts")
    rows = {
        (int(seq), int(pos))
        for info in folder.shards("heldout")
        for shard in [folder.open(info)]
        for seq, pos in zip(shard.seq, shard.pos, strict=True)
    }
    scored = sum((seq, pos + 1) in rows for seq, pos in rows)
    result = evaluate_run(make_run(tmp_path / "run", tmp_path / "acts"), model=child, write=False)
    assert result.lm["lm_tokens"] == scored
    names = {tokenizer.convert_ids_to_tokens(int(folder.tokens(seq)[pos])) for seq, pos in rows}
    assert not names & set(left_out)
    assert len(names) > 30


def test_rows_beyond_the_norm_limit_are_not_replaced(family, tmp_path):
    """An SAE that gives x back where it was trained, and nonsense at sinks, loses nothing."""
    tokenizer = tiny_models.tokenizer(special=False)
    model = tiny_models.model("gpt2", head=True)
    with torch.no_grad():
        model.transformer.wpe.weight[0] *= 2000
    config = HarvestConfig(**CONFIG, max_norm_multiple="auto")
    harvest(tmp_path / "acts", config, model=model, tokenizer=tokenizer, text=TEXTS, progress=False)
    folder = ShardFolder(tmp_path / "acts")
    assert folder.index["dropped"]["outlier_norm"] > 0
    run = make_run(tmp_path / "run", tmp_path / "acts")
    limit = 10 * folder.index["median_norms"]["layers.1"]
    call = SAE.forward

    def exact_within(self, x):
        out = call(self, x)
        return out._replace(x_hat=torch.where((x.norm(dim=1) <= limit)[:, None], x, -x))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAE, "forward", exact_within)
        assert evaluate_run(run, model=model, write=False).lm["delta_loss"] == 0
        index = folder.index | {"max_norm_multiple": None}
        patch.setattr(ShardFolder, "index", index, raising=False)
        patch.setattr("saefast.data.shards.read_index", lambda path: dict(index))
        assert evaluate_run(run, model=model, write=False).lm["delta_loss"] != 0


def test_text_with_nothing_to_score_is_said(family, tmp_path):
    _, _, child, tokenizer, _ = family
    texts = ["w1 w2", "w3 w2", "w5 w2", "w6 w2 w7"] * 9
    config = HarvestConfig(**CONFIG, exclude_tokens=("w2",))
    harvest(tmp_path / "acts", config, model=child, tokenizer=tokenizer, text=texts, progress=False)
    result = evaluate_run(make_run(tmp_path / "run", tmp_path / "acts"), model=child, write=False)
    assert result.lm_left_out == "no text to score: no sequence holds two ordinary tokens in a row"


# --- runs that trained live


@pytest.fixture
def live_run(family, tmp_path, monkeypatch):
    """A run that read with the child, saved in the folder of the parent at the time."""
    _, parent, child, tokenizer, _ = family
    monkeypatch.setattr(reharvest, "TOKENS", 2000)
    child.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in TEXTS), encoding="utf-8")
    config = HarvestConfig(**CONFIG, model=str(tmp_path / "model"), text=str(text), exclude_tokens=("w3",))
    source = live_sources(config, reservoir_rows=1)["layers.1"]
    described = reharvest.describe_live(config, (str(text),), "layers.1", source.identity)
    source.close()
    assert source.identity == identity_of(load_model(tmp_path / "model"), load_tokenizer(tmp_path / "model"))
    return make_run(tmp_path / "run", None, described), tmp_path / "model", parent, child


def test_a_live_run_is_harvested_again_from_its_own_model_alone(live_run, family):
    run, place, parent, child = live_run
    parent.save_pretrained(place)
    for _ in range(2):
        with pytest.raises(InputError, match="was harvested from another model than this one, its weights are others"):
            evaluate_run(run)
        assert not (run / "activations").exists()
    with pytest.raises(InputError, match="another model"):
        evaluate_run(run, model=parent)
    result = evaluate_run(run, model=child)
    assert result.lm["lm_tokens"] > 0
    assert ShardFolder(run / "activations").index["excluded_ids"] == [8]
    # The rows are there now: another call needs no model for them, but none that is another either.
    assert "is not the model that was harvested" in evaluate_run(run).lm_left_out
    assert evaluate_run(run, model=family[0] / "child", write=False).lm == result.lm
    with pytest.raises(InputError, match="another model"):
        evaluate_run(run, model=parent)


def test_a_live_run_with_a_model_from_elsewhere(live_run, family):
    run, place, parent, _ = live_run
    parent.save_pretrained(place)
    assert evaluate_run(run, model=str(family[0] / "child")).lm["lm_tokens"] > 0


def test_a_live_run_goes_on_with_its_model_alone(live_run):
    run, _, parent, child = live_run
    metadata = load(run).config.metadata
    identity = identity_of(child, None)
    reharvest.check_resumed(run, metadata, identity)
    with pytest.raises(InputError, match=r"run was harvested from another model than this one, its weights are others"):
        reharvest.check_resumed(run, metadata, identity_of(parent, None))


def test_a_live_run_of_several_hooks_has_them_all_again(family, tmp_path):
    folder = family[0]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in TEXTS), encoding="utf-8")
    hooks = {"x": "layers.0", "target": "layers.1"}
    settings = dict(CONFIG, hooks=("layers.0", "layers.1"), model=str(folder / "child"), text=str(text))
    config = HarvestConfig(**settings)
    source = live_source(config, hooks, reservoir_rows=1)
    described = reharvest.describe_live(config, (str(text),), hooks, source.identity)
    source.close()
    assert described["hook_name"] == "layers.0"
    kept = recorded_data(described, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        reharvest.harvest_again(tmp_path, kept)
    assert ShardFolder(tmp_path / kept["path"]).hooks == ["layers.0", "layers.1"]
    again = open_source(tmp_path / kept["path"], hooks=kept["hooks"])
    assert again.widths == {"x": 16, "target": 16}


def test_a_live_run_of_before_is_harvested_again_with_a_word(live_run):
    run, place, _, _ = live_run
    metadata = load(run).config.metadata
    del metadata["data"]["identity"]
    make_run(run, None, metadata)
    with pytest.warns(
        RuntimeWarning, match=f"run keeps no digest of the model that it trained on: that {place} is that"
    ):
        evaluate_run(run, lm_tokens=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        evaluate_run(run, lm_tokens=0)


def test_the_command_line_trains_on_live_and_checks_the_same_model(family, tmp_path, monkeypatch, capsys):
    folder, parent, child, tokenizer, _ = family
    monkeypatch.setattr(reharvest, "TOKENS", 2000)
    child.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text, run = tmp_path / "text.jsonl", tmp_path / "run"
    text.write_text("\n".join(json.dumps({"text": line}) for line in tiny_models.documents(300)), encoding="utf-8")
    live = ["train", "--live", "--model", str(tmp_path / "model"), "--text", str(text), "--hook", "layers.1"]
    monkeypatch.setattr(reader, "forward_dtype", lambda name, device: "bfloat16" if name == "auto" else name)
    live += ["--n-latents", "32", "--k", "4", "--batch-size", "32", "--device", "cpu", "--out", str(run)]
    assert cli.main([*live, "--n-tokens", "256"]) == 0
    loaded = load_model(tmp_path / "model", dtype=torch.bfloat16)
    assert load(run).config.metadata["data"]["identity"] == identity_of(loaded, tokenizer)
    parent.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    for command in ([*live, "--n-tokens", "512", "--resume"], ["eval", str(run)], ["features", str(run)]):
        assert cli.main(command) == 2
        assert "was harvested from another model than this one, its weights are others" in capsys.readouterr().err
    # Evaluated on a machine on which "auto" is another dtype, the model runs as it did.
    monkeypatch.setattr(reader, "forward_dtype", lambda name, device: "float32" if name == "auto" else name)
    assert cli.main(["eval", str(run), "--model", str(folder / "child")]) == 0
    assert "spliced into" in capsys.readouterr().out
    child.save_pretrained(tmp_path / "model")
    assert cli.main([*live, "--n-tokens", "512", "--resume"]) == 0
    assert load(run).config.metadata["data"]["identity"]["dtype"] == "bfloat16"
