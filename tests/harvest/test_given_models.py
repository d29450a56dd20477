"""Models given as objects: how much they read at most, and nnsight's, which hold a torch module."""

import dataclasses
from types import SimpleNamespace

import architectures
import pytest
import tiny_models
import torch

from saefast.errors import InputError
from saefast.harvest import HarvestConfig, harvest, harvest_batches
from saefast.harvest.language_models import context_limit

pytest.importorskip("transformers")
CONFIG = HarvestConfig(hooks=("layers.1",), ctx_len=16, dtype="float32", forward="float32")


@pytest.mark.parametrize(
    ("name", "limit"),
    [("xlnet", None), ("llava", 64), ("qwen2vl", 64), ("gemma3 with vision", 64), ("mpt", 64), ("bloom", None)],
)
def test_the_longest_context_is_that_of_the_part_that_reads_text(name, limit):
    assert context_limit(architectures.build(name)) == limit


def test_what_is_no_length_is_no_limit():
    for value in (-1, 0, None, "64", 2.5):
        model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=value, n_positions=-1))
        assert context_limit(model) is None
    both = SimpleNamespace(config=SimpleNamespace(text_config={"n_positions": 32}, max_position_embeddings=64))
    assert context_limit(both) == 32
    assert context_limit(SimpleNamespace(cfg=SimpleNamespace(n_ctx=48))) == 48


def test_rows_of_a_model_that_works_on_length_by_batch_are_put_right():
    # XLNet, which names no limit. With as many texts as tokens in each, the shape alone would not tell.
    model, tokenizer = architectures.build("xlnet"), tiny_models.tokenizer(special=False)
    text = [" ".join(f"w{n}" for n in range(first, first + 16)) for first in range(16)]
    config = dataclasses.replace(CONFIG, batch_tokens=256, heldout=0.0)
    batches = list(harvest_batches(config, model=model, tokenizer=tokenizer, text=text))
    assert max(len(batch.counts) for batch in batches) == 16
    for batch in batches:
        for seq in batch.seq.unique().tolist():
            ids = torch.tensor([batch.window.ids[seq]])
            with torch.no_grad():
                state = model(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
            rows = batch.seq == seq
            assert torch.allclose(batch.rows["layers.1"][rows], state[batch.pos[rows]], atol=1e-5)


class Halved(torch.nn.Module):
    """Keeps every second token."""

    def __init__(self):
        super().__init__()
        self.table, self.block = torch.nn.Embedding(66, 8), torch.nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask=None):
        return self.block(self.table(input_ids)[:, ::2])


def test_rows_that_are_not_by_sequence_and_token_are_refused():
    tokenizer = tiny_models.tokenizer(special=False)
    text = [" ".join(f"w{n}" for n in range(first, first + 16)) for first in range(9)]
    config = dataclasses.replace(CONFIG, hooks=("block",))
    with pytest.raises(InputError, match=r"hook 'block' gives shape \(1, 8, 8\) for \(1, 16\) tokens"):
        list(harvest_batches(config, model=Halved(), tokenizer=tokenizer, text=text))


def test_modules_that_see_all_tokens_in_one_row_give_them_by_sequence():
    """OPT's MLP: what it adds is what lies between the residual stream before and after, in every row of a batch."""
    model, tokenizer = architectures.build("opt"), tiny_models.tokenizer(special=False)
    hooks = ("blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post")
    batches = harvest_batches(
        dataclasses.replace(CONFIG, hooks=hooks), model=model, tokenizer=tokenizer, text=tiny_models.documents(20)
    )
    n = 0
    for batch in batches:
        mid, added, post = (batch.rows[hook] for hook in hooks)
        assert torch.allclose(mid + added, post, atol=1e-4)
        n += len(mid)
    assert n > 100


# As much of nnsight's classes as anything outside them sees. Both keep the torch module in an attribute and hand on
# whatever else is asked of them: 0.3 as _model, with dispatch_model; 0.4 and newer as _module, with dispatch.
class _Old:
    def __init__(self, model, tokenizer, loaded):
        self._model, self.tokenizer, self._loaded = model, tokenizer, loaded

    def __getattr__(self, name):
        return getattr(self.__dict__["_model"], name)

    def dispatch_model(self):
        self._model = self._loaded()


class _New:
    def __init__(self, model, tokenizer, loaded):
        self._module, self.tokenizer, self._loaded = model, tokenizer, loaded

    def __getattr__(self, name):
        return getattr(self.__dict__["_module"], name)

    def dispatch(self):
        self._module = self._loaded()


class _Skeleton:
    def __init__(self, model):
        self._module = model


for kind in (_Old, _New, _Skeleton):
    kind.__module__ = "nnsight.modeling.language"


@pytest.mark.parametrize("kind", [_Old, _New])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_model_of_nnsight_is_harvested_as_the_module_in_it(tmp_path, kind, lazy):
    tokenizer = tiny_models.tokenizer(special=False)

    def real():
        return tiny_models.model("gpt2", head=True)

    skeleton = real().to("meta") if lazy else real()
    wrapped = kind(skeleton, tokenizer, real)
    options = {"text": tiny_models.documents(20), "progress": False}
    report = harvest(tmp_path / "a", CONFIG, model=wrapped, **options)
    harvest(tmp_path / "b", CONFIG, model=real(), tokenizer=tokenizer, **options)
    (a,), (b,) = (
        [
            torch.cat(
                [
                    batch.rows["layers.1"]
                    for batch in harvest_batches(CONFIG, model=m, tokenizer=t, text=options["text"])
                ]
            )
        ]
        for m, t in ((wrapped, None), (real(), tokenizer))
    )
    assert report.rows > 0
    assert torch.equal(a, b)
    assert [path.read_bytes() for path in sorted((tmp_path / "a").glob("layers.1/*"))] == [
        path.read_bytes() for path in sorted((tmp_path / "b").glob("layers.1/*"))
    ]
    # Nothing is left to do, whichever of the two is given.
    assert harvest(tmp_path / "a", CONFIG, model=wrapped, **options).tokens == 0


def test_a_model_of_nnsight_without_weights_is_refused():
    model = _Skeleton(tiny_models.model("gpt2").to("meta"))
    with pytest.raises(InputError, match="_Skeleton of nnsight without weights"):
        list(harvest_batches(CONFIG, model=model, tokenizer=tiny_models.tokenizer(), text=["w1 w2"]))


@pytest.mark.peers
@pytest.mark.parametrize("lazy", [False, True])
def test_the_models_of_the_installed_nnsight_are_harvested(tmp_path, monkeypatch, lazy):
    nnsight = pytest.importorskip("nnsight")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokenizer = tiny_models.model("gpt2", head=True), tiny_models.tokenizer(special=False)
    if lazy:
        if not hasattr(nnsight.LanguageModel, "dispatch"):
            pytest.skip("this nnsight is older than transformers 5, and loads no weights with it")
        model.save_pretrained(tmp_path / "m")
        wrapped, own = nnsight.LanguageModel(str(tmp_path / "m"), tokenizer=tokenizer), None
    else:
        wrapped, own = nnsight.NNsight(model), tokenizer
    text = tiny_models.documents(20)
    rows = [
        torch.cat([batch.rows["layers.1"] for batch in harvest_batches(CONFIG, model=given, tokenizer=own, text=text)])
        for given, own in ((wrapped, own), (model, tokenizer))
    ]
    assert len(rows[0]) > 100
    assert torch.equal(*rows)
