"""Whose rows: a harvest goes on with the model and tokenizer that it began with, whatever they are called."""

import copy
import json
import warnings

import pytest
import tiny_models
import torch

from saefast.data.shards import ShardFolder
from saefast.errors import InputError
from saefast.files import SEAL
from saefast.harvest import identity, reader
from saefast.harvest.harvester import Harvester
from saefast.harvest.identity import identity_of, tokenizer_digest, weights_digest, why_other
from saefast.harvest.language_models import load_model, load_tokenizer
from saefast.harvest.to_disk import HarvestConfig, harvest

CONFIG = dict(hooks=("layers.1",), ctx_len=16, dtype="float32", forward="float32", heldout=0.2, device="cpu")
TEXTS = tiny_models.documents(60)


def changed(model, part="layers.1", by=1e-6):
    """The model with one number changed, as training changes all of them."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.get_submodule(part).parameters()).view(-1)[5] += by
    return other


# --- digests


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_the_same_model_is_the_same_wherever_it_comes_from(tmp_path, kind):
    """With its head or without, saved and loaded, compiled; other dtypes give other rows."""
    model, tokenizer = tiny_models.model(kind, head=True), tiny_models.tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    whole = identity_of(model, tokenizer)
    for load in ("AutoModel", {"bert": "AutoModelForMaskedLM"}.get(kind, "AutoModelForCausalLM")):
        again = identity_of(load_model(tmp_path, head=load), load_tokenizer(tmp_path))
        assert why_other(whole, again) == why_other(again, whole) == ""
        assert json.loads(json.dumps(again)) == again
    assert weights_digest(torch.compile(model)) == weights_digest(model)
    assert why_other(whole, identity_of(model.bfloat16(), None)).startswith("its weights are bfloat16, those harvested")


def test_one_number_is_enough_to_tell_models_apart():
    model = tiny_models.model("llama", head=True)
    whole = identity_of(model, None)
    for name, parameter in model.named_parameters():
        for place in (0, parameter.numel() // 2, parameter.numel() - 1):
            other = copy.deepcopy(model)
            with torch.no_grad():
                value = other.get_parameter(name).view(-1)[place]
                value.copy_(torch.nextafter(value, torch.tensor(10.0)))
            found = why_other(whole, identity_of(other, None))
            part = ".".join(name.removeprefix("model.").split(".")[: 2 if "layers" in name else 1])
            assert found == f"its weights are others (1 of 6 parts, {part} first)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(), (3,), (7, 5), (0, 4), (101, 3)])
def test_every_byte_of_any_tensor_counts(dtype, shape):
    class Holder(torch.nn.Module):
        def __init__(self, tensor):
            super().__init__()
            self.register_buffer("held", tensor)

    tensor = (torch.randn(shape) * 3).to(dtype)
    digest = weights_digest(Holder(tensor))
    for place in range(tensor.numel()):
        other = tensor.clone()
        flat = other.view(-1)
        flat[place] = ~flat[place] if dtype is torch.bool else flat[place] + 1
        assert weights_digest(Holder(other)) != digest
    # Where the numbers lie makes no difference: a view into a larger tensor, columns instead of rows.
    shifted = torch.cat([tensor.view(-1)[:1], tensor.view(-1)])[min(tensor.numel(), 1) :].view(shape)
    assert weights_digest(Holder(shifted)) == digest
    if tensor.dim() == 2:
        assert weights_digest(Holder(tensor.T.contiguous().T)) == digest


def test_numbers_that_changed_places_are_other_numbers():
    model = tiny_models.model("llama")
    whole = identity_of(model, None)
    other = copy.deepcopy(model)
    with torch.no_grad():
        weight = other.layers[2].mlp.up_proj.weight
        weight.copy_(weight.flip(0))
    assert why_other(whole, identity_of(other, None)) == "its weights are others (1 of 5 parts, layers.2 first)"


def test_fewer_blocks_are_another_model():
    model = tiny_models.model("llama")
    whole = identity_of(model, None)
    short = copy.deepcopy(model)
    del short.layers[2]
    assert why_other(whole, identity_of(short, None)) == "its weights are others (1 of 5 parts, layers.2 first)"
    found = why_other(identity_of(tiny_models.model("bert"), None), whole)
    assert found == "its weights have other names (layers.0, not encoder.layer.0)"


def test_a_pooler_that_each_load_makes_up_is_no_difference(tmp_path):
    tiny_models.model("bert", head=True).save_pretrained(tmp_path)
    one, other = load_model(tmp_path), load_model(tmp_path)
    assert not torch.equal(one.pooler.dense.weight, other.pooler.dense.weight)
    assert weights_digest(one) == weights_digest(other)


def test_what_cannot_be_digested_is_not_known():
    assert identity_of(object(), None) == {"dtype": None, "weights": None, "tokenizer": None}
    model = identity_of(tiny_models.model("llama"), tiny_models.tokenizer())
    assert why_other(model, identity_of(object(), None)) == why_other({}, model) == ""
    with torch.device("meta"):
        hollow = tiny_models.model("llama")
    assert weights_digest(hollow)["layers.0"] != weights_digest(tiny_models.model("llama"))["layers.0"]


def test_tokenizers_are_told_apart_by_what_they_make_of_text(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def bpe(merges, prefix_space=False):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE({name: i for i, name in enumerate([*alphabet, "ab", "bc", "abc"])}, merges))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
        return PreTrainedTokenizerFast(tokenizer_object=core)

    plain, bos = tiny_models.tokenizer(), tiny_models.tokenizer(special=False)
    first = bpe([("a", "b"), ("ab", "c")])
    different = [plain, bos, first, bpe([("b", "c"), ("a", "bc")]), bpe([("a", "b"), ("ab", "c")], prefix_space=True)]
    assert len({tokenizer_digest(tokenizer) for tokenizer in different}) == len(different)
    for tokenizer in (plain, first):
        before = tokenizer_digest(tokenizer)
        # What calls leave in it is no part of it.
        tokenizer(["ab", "abcab a"], padding=tokenizer.pad_token is not None, truncation=True, max_length=3)
        assert tokenizer_digest(tokenizer) == before
        tokenizer.save_pretrained(tmp_path)
        assert tokenizer_digest(load_tokenizer(tmp_path)) == before


# --- harvests


def begun(folder, model, tokenizer, tokens=300):
    return harvest(
        folder,
        HarvestConfig(**CONFIG, max_tokens=tokens),
        model=model,
        tokenizer=tokenizer,
        text=TEXTS,
        progress=False,
    )


def refused(folder, message, **given):
    """A call that would go on, and one that has nothing left to do: both refused, nothing changed."""
    index = (folder / "index.json").read_bytes()
    for tokens in (None, 300):
        with pytest.raises(InputError, match=message) as error:
            harvest(folder, HarvestConfig(**CONFIG, max_tokens=tokens), text=TEXTS, progress=False, **given)
        assert "\n" not in str(error.value)
    assert (folder / "index.json").read_bytes() == index
    assert not ShardFolder(folder).verify()


def test_another_model_of_the_same_name_is_refused(tmp_path):
    model, tokenizer = tiny_models.model("llama"), tiny_models.tokenizer()
    begun(tmp_path / "acts", model, tokenizer)
    message = r"acts was harvested from another model than this one, its weights are others \(1 of 5 parts, layers\.1 "
    refused(tmp_path / "acts", message, model=changed(model), tokenizer=tokenizer)
    assert begun(tmp_path / "acts", copy.deepcopy(model), tokenizer, None).complete


def test_another_tokenizer_is_refused(tmp_path):
    model = tiny_models.model("llama")
    begun(tmp_path / "acts", model, tiny_models.tokenizer())
    refused(tmp_path / "acts", "its tokenizer is another", model=model, tokenizer=tiny_models.tokenizer(special=False))


def test_a_folder_of_a_model_that_was_overwritten_is_refused(tmp_path):
    """Named by a path, under which another model lies now."""
    model = tiny_models.model("llama")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    config = dict(CONFIG, model=str(tmp_path / "model"))
    first = harvest(tmp_path / "acts", HarvestConfig(**config, max_tokens=300), text=TEXTS, progress=False)
    changed(model).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="harvested from another model than this one, its weights are others"):
        harvest(tmp_path / "acts", HarvestConfig(**config), text=TEXTS, progress=False)
    # With nothing left to do no model is loaded.
    again = harvest(tmp_path / "acts", HarvestConfig(**config, max_tokens=300), text=TEXTS, progress=False)
    assert (again.rows, again.tokens) == (first.rows, 0)


def test_another_machine_goes_on_in_the_dtype_that_was_begun_in(tmp_path, monkeypatch):
    """What "auto" means depends on the processor; rows of two dtypes are of two models."""
    tiny_models.model("llama").save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    settings = dict(CONFIG, forward="auto", model=str(tmp_path / "model"))
    for chosen, tokens in (("bfloat16", 300), ("float32", None)):
        monkeypatch.setattr(
            reader, "forward_dtype", lambda name, device, chosen=chosen: chosen if name == "auto" else name
        )
        harvest(tmp_path / "acts", HarvestConfig(**settings, max_tokens=tokens), text=TEXTS, progress=False)
        assert ShardFolder(tmp_path / "acts").index["forward"] == "bfloat16"
    assert ShardFolder(tmp_path / "acts").index["settings"]["forward"] == "auto"
    model, tokenizer = tiny_models.model("llama"), tiny_models.tokenizer()
    begun(tmp_path / "given", model, tokenizer)
    message = "its weights are bfloat16, those harvested from were float32"
    refused(tmp_path / "given", message, model=model.bfloat16(), tokenizer=tokenizer)


def test_a_folder_of_before_goes_on_with_a_word_and_claims_nothing(tmp_path):
    model, tokenizer = tiny_models.model("llama"), tiny_models.tokenizer()
    begun(tmp_path, model, tokenizer)
    path = tmp_path / "index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    for name in ("identity", "special_ids", "excluded_ids", SEAL):
        del index[name]
    for reason in ("excluded", "not_finite"):
        del index["dropped"][reason]
    path.write_text(json.dumps(index), encoding="utf-8")
    with pytest.warns(RuntimeWarning, match="begun before digests of models were kept"):
        report = begun(tmp_path, model, tokenizer, None)
    assert "identity" not in ShardFolder(tmp_path).index
    assert report.dropped["special"] == 2 * report.sequences
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert begun(tmp_path, changed(model), tokenizer, None).tokens == 0


def test_an_expected_model_is_insisted_on(tmp_path):
    """As a run that trained live records it."""
    model, tokenizer = tiny_models.model("llama"), tiny_models.tokenizer()
    expected = Harvester(HarvestConfig(**CONFIG), model=model, tokenizer=tokenizer, text=TEXTS).identity
    options = dict(tokenizer=tokenizer, text=TEXTS, progress=False, identity=expected)
    with pytest.raises(InputError, match="harvested from another model than this one"):
        harvest(tmp_path / "acts", HarvestConfig(**CONFIG), model=changed(model), **options)
    assert not (tmp_path / "acts").exists()
    harvest(tmp_path / "acts", HarvestConfig(**CONFIG), model=model, **options)
    assert ShardFolder(tmp_path / "acts").index["identity"] == expected


def test_a_number_that_lies_between_those_looked_at_counts_too() -> None:
    """A large tensor is sampled; the sum over all of it tells of the rest."""
    model = torch.nn.Linear(300, 300)
    words = model.weight.numel() * model.weight.element_size() // 8
    assert words // identity._SAMPLE > 2, "every word is looked at"
    before = weights_digest(model)
    with torch.no_grad():
        # Numbers 2 and 3 are the word after the first, which alone of the first few is looked at.
        model.weight.view(-1)[2] += 1
    assert weights_digest(model) != before
