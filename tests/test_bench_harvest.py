"""The benchmark of harvests compares a harvest with forward passes over its own batches, as far as its own module."""

import tiny_models
import torch

from bench import common, harvest
from saefast.data.shards import ShardFolder
from saefast.harvest.config import HarvestConfig
from saefast.harvest.to_disk import harvest as harvest_to_disk

CONFIG = HarvestConfig(hooks=("layers.1",), ctx_len=16, batch_tokens=100, dtype="float32", device="cpu")


def test_the_batches_are_those_of_a_harvest(tmp_path):
    model, tokenizer, text = tiny_models.model("llama"), tiny_models.tokenizer(), tiny_models.documents(20)
    batches = harvest.recorded(CONFIG, text, model, tokenizer)
    harvest_to_disk(tmp_path / "acts", CONFIG, model=model, tokenizer=tokenizer, text=text, progress=False)
    folder = ShardFolder(tmp_path / "acts")
    assert harvest.tokens_in(batches) == sum(len(folder.tokens(seq)) for seq in range(folder.n_sequences))
    assert len(batches) > 3
    # A harvest's own hooks are gone, and a pass takes the batches as they are.
    hooked = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert hooked == []
    harvest.passes(model, batches, "cpu", None)


def test_a_cut_pass_ends_with_the_module():
    model, ran = tiny_models.model("llama"), []
    for number, block in enumerate(model.layers):
        block.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    batch = {"input_ids": torch.ones((1, 4), dtype=torch.int64)}
    harvest.passes(model, [batch, batch], "cpu", model.layers[1], workers=1)
    assert ran == [0, 1, 0, 1]
    harvest.passes(model, [batch], "cpu", None)
    assert ran == [0, 1, 0, 1, 0, 1, 2]


def test_a_line_is_a_rate_and_its_share():
    line = harvest.line("harvest", common.Spread(2.0, 1.0, 4.0), 1000, common.Spread(1.5, 1.5, 1.5))
    assert (line["tokens/s"], line["low"], line["high"], line["of the cut pass"]) == (500.0, 250.0, 1000.0, 0.75)


def test_text_is_no_longer_than_asked():
    found = harvest.documents(2000)
    assert sum(map(len, found[:-1])) < 2000 <= sum(map(len, found))
