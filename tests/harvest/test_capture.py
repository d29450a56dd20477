"""What a hook's rows are: those of its module's turn in eval mode, of the token they are stored with, whatever hooks
stand beside it; and what no such rows are to be had of is refused in one line."""

from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from saefast.errors import InputError
from saefast.harvest.capture import runner_for
from saefast.harvest.config import HarvestConfig
from saefast.harvest.live import live_source
from saefast.harvest.to_disk import harvest_batches

CONFIG: dict[str, Any] = {"ctx_len": 16, "batch_tokens": 64, "heldout": 0.0, "device": "cpu", "dtype": "float32"}


@pytest.fixture(autouse=True)
def one_thread():
    """These models are so small that threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_models.tokenizer()


def config(*hooks: str, **changes: Any) -> HarvestConfig:
    return HarvestConfig(hooks=hooks, **CONFIG | changes)


def ran(model: Any, *hooks: str, ids: Tensor | None = None, mask: Tensor | None = None) -> list[Tensor]:
    """Per hook its values (batch, length, d) for some ids, four sequences of six unless given."""
    if ids is None:
        ids = torch.randint(4, 60, (4, 6), generator=torch.Generator().manual_seed(1))
    runner = runner_for(model, hooks)
    with runner.attached():
        values = runner.run(ids, torch.ones_like(ids).bool() if mask is None else mask)
    return [values[hook] for hook in hooks]


def padded(lengths: tuple[int, ...] = (9, 6, 2, 1), pad: int = 0) -> tuple[Tensor, Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(4, 60, mask.shape, generator=torch.Generator().manual_seed(2))
    return ids.where(mask, pad), mask


# Eval mode


def dropping() -> Any:
    """A GPT-2 with its default dropout, in train mode but for one frozen block."""
    model = tiny_models.model("gpt2").train()
    model.h[0].eval()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def rows(batches: Any, hook: str) -> Tensor:
    return torch.cat([batch.rows[hook] for batch in batches])


def test_a_model_in_train_mode_is_harvested_without_dropout_and_has_its_modes_back(tokenizer: Any) -> None:
    model, options = dropping(), {"tokenizer": tokenizer, "text": tiny_models.documents(20)}
    before = modes(model)
    assert set(before) == {True, False}
    quiet = rows(harvest_batches(config("layers.1"), model=tiny_models.model("gpt2"), **options), "layers.1")
    assert torch.equal(rows(harvest_batches(config("layers.1"), model=model, **options), "layers.1"), quiet)
    assert modes(model) == before
    # It would have been noticed.
    ids = torch.randint(4, 60, (1, 8))
    assert not torch.equal(model(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)


def test_modes_come_back_from_a_harvest_that_is_left_or_fails(tokenizer: Any) -> None:
    model, options = dropping(), {"tokenizer": tokenizer, "text": tiny_models.documents(20)}
    before = modes(model)
    left = harvest_batches(config("layers.1"), model=model, **options)
    next(left)
    assert not any(modes(model))
    left.close()
    assert modes(model) == before
    # One of two that read the same model goes on without dropout when the other has ended.
    both = [harvest_batches(config("layers.1"), model=model, **options) for _ in range(2)]
    for each in both:
        next(each)
    both[0].close()
    assert not any(modes(model))
    both[1].close()
    assert modes(model) == before
    with pytest.raises(InputError, match="expected activations"):
        list(harvest_batches(config("h.1.ln_1"), model=Broken(model), **options))
    assert modes(model) == before


class Broken(nn.Module):
    """Fails in the middle."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.h, self.wte = model.h, model.wte

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.h[1].ln_1(self.wte(input_ids)[0])


def test_live_training_and_workers_are_in_eval_mode_too(tokenizer: Any) -> None:
    texts = tiny_models.documents(40)
    model, options = dropping(), {"tokenizer": tokenizer, "text": texts}
    quiet = rows(harvest_batches(config("layers.1"), model=tiny_models.model("gpt2"), **options), "layers.1")
    torch.set_num_threads(3)
    before = modes(model)
    together = rows(harvest_batches(config("layers.1"), model=model, **options), "layers.1")
    assert torch.allclose(together, quiet, atol=1e-6)
    assert modes(model) == before
    source = live_source(config("layers.1"), model=model, reservoir_rows=256, **options)
    (batch,) = next(iter(source.batches(32))).values()
    distances = torch.cdist(batch, quiet).min(1).values
    assert distances.max() < 1e-4
    source.close()
    assert modes(model) == before


# Turns


class Looped(nn.Module):
    """A block that runs as often as the first token says, four times by default, and a head."""

    def __init__(self, turns: int | None = 4) -> None:
        super().__init__()
        self.turns, self.emb = turns, nn.Embedding(66, 8)
        self.block, self.head, self.skipped = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.emb(input_ids)
        for _ in range(self.turns or int(input_ids[0, 0])):
            x = x + torch.tanh(self.block(x))
        return self.head(x)


@pytest.mark.parametrize("company", [(), ("head",), ("emb", "block@3", "head"), ("block@0:in", "block@-3")])
@pytest.mark.parametrize("hook", ["block@0", "block@2", "block@-1", "block@-2:in"])
def test_a_hooks_rows_are_its_turns_whatever_stands_beside_it(hook: str, company: tuple[str, ...]) -> None:
    model = Looped()
    ids = torch.randint(4, 60, (3, 5))
    with torch.no_grad():
        x = model.emb(ids)
        ins, outs = [], []
        for _ in range(4):
            ins.append(x)
            outs.append(model.block(x))
            x = x + torch.tanh(outs[-1])
    expected = {"block@0": outs[0], "block@2": outs[2], "block@-1": outs[3], "block@-2:in": ins[2]}[hook]
    assert torch.equal(ran(model, hook, *company, ids=ids)[0], expected)
    assert torch.equal(ran(model, *company, hook, ids=ids)[-1], expected)


@pytest.mark.parametrize("company", [(), ("head",)])
def test_a_turn_that_is_not_named_is_refused_with_how_to_name_it(tokenizer: Any, company: tuple[str, ...]) -> None:
    message = (
        r"'block' runs 4 times in one forward pass: name the turn, block@0 \.\.\. block@3, or block@-1 for the last"
    )
    for model in (Looped(), Looped().train()):
        options = {"model": model, "tokenizer": tokenizer, "text": ["w1 w2 w3"]}
        with pytest.raises(InputError, match=message):
            list(harvest_batches(config("block", *company), **options))
    (batch,) = harvest_batches(config("block@3", *company), **options)
    assert batch.rows["block@3"].shape == (3, 8)
    with pytest.raises(InputError, match=r"'block@4': that module ran 4 times .* its turns are 0 \.\.\. 3"):
        list(harvest_batches(config("block@4", *company), **options))


def test_shared_layers_of_albert_are_named_by_their_turn() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.AlbertModel(
        transformers.AlbertConfig(vocab_size=66, num_hidden_layers=5, max_position_embeddings=64, **sizes)
    ).eval()
    layer, ids = "encoder.albert_layer_groups.0.albert_layers.0", torch.randint(4, 60, (2, 7))
    with pytest.raises(InputError, match=rf"'{layer}' runs 5 times .* name the turn, {layer}@0 \.\.\. {layer}@4"):
        ran(model, layer, ids=ids)
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    seen = ran(model, *(f"{layer}@{turn}" for turn in (0, 1, 4, -5, -1)), f"{layer}@2:in", ids=ids)
    for value, number in zip(seen, (1, 2, 5, 1, 5, 2), strict=True):
        assert torch.allclose(value, states[number], atol=1e-6)


def test_a_module_that_runs_more_or_less_often_in_some_passes_never_gives_another_turn() -> None:
    model = Looped(turns=None)
    three, six, one = (torch.full((2, 4), first) for first in (3, 6, 1))
    mask = torch.ones(2, 4, dtype=torch.bool)
    runner = runner_for(model, ["block@2", "block@-1"])
    with runner.attached(), torch.no_grad():
        for ids in (three, six):
            values = runner.run(ids, mask)
            x = model.emb(ids)
            outs = []
            for _ in range(int(ids[0, 0])):
                outs.append(model.block(x))
                x = x + torch.tanh(outs[-1])
            assert torch.equal(values["block@2"], outs[2])
            assert torch.equal(values["block@-1"], outs[-1])
        with pytest.raises(InputError, match="'block@2': that module ran 1 times in this forward pass"):
            runner.run(one, mask)
    runner = runner_for(model, ["block", "head"])
    with runner.attached():
        runner.run(one, mask)
        with pytest.raises(InputError, match="'block' runs 3 times in one forward pass"):
            runner.run(three, mask)


def test_a_pass_stops_at_the_last_place_and_goes_on_where_turns_are_counted_from_the_last() -> None:
    model, seen = Looped(), []
    for name in ("block", "head"):
        model.get_submodule(name).register_forward_pre_hook(lambda *_args, name=name: seen.append(name))
    whole = ["block"] * 4 + ["head"]
    # The first pass is to count by, and always whole.
    for hooks, second in (
        (["block@1"], ["block"] * 2),
        (["block@2:in", "emb"], ["block"] * 3),
        (["block@-4"], whole),
        (["block@1", "head"], whole),
    ):
        seen.clear()
        ran(model, *hooks)
        assert seen == whole + second


def test_several_workers_count_once_and_each_for_itself(tokenizer: Any) -> None:
    model, texts = Looped(), tiny_models.documents(60)
    options = {"model": model, "tokenizer": tokenizer, "text": texts}
    hooks = ("block@1", "block@-1", "emb+block@2:in")
    alone = list(harvest_batches(config(*hooks), **options))
    torch.set_num_threads(4)
    together = list(harvest_batches(config(*hooks), **options))
    assert len(alone) > 8
    for one, two in zip(alone, together, strict=True):
        for hook in hooks:
            assert torch.allclose(one.rows[hook], two.rows[hook], atol=1e-6)
    with pytest.raises(InputError, match="'block' runs 4 times"):
        list(harvest_batches(config("block"), **options))


def test_several_places_of_a_hook_stand_side_by_side_and_blocks_give_what_the_next_takes() -> None:
    model = tiny_models.model("llama")
    both, first, second, into, own = ran(
        model, "layers.0+layers.1", "layers.0", "layers.1", "layers.1:in", "layers.2.self_attn:in"
    )
    assert torch.equal(both, torch.cat([first, second], -1))
    assert torch.equal(into, first)
    assert not torch.equal(own, second)
    assert torch.equal(own, ran(model, "layers.2.input_layernorm")[0])


class Shared:
    """As much of TransformerLens' interface as is needed, with a hook point that a pass meets three times."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.embed = tokenizer, torch.randn(66, 8).round()
        self.cfg = SimpleNamespace(model_name="shared", n_ctx=64, d_vocab=66)
        self.hook_dict = dict.fromkeys(["hook_embed", "block.hook_out", "hook_last"])
        self.met: list[str] = []

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: Any = (), **_: Any) -> None:
        x = self.embed[tokens]
        for name in ("hook_embed", *["block.hook_out"] * 3, "hook_last"):
            x = x + 1
            self.met.append(name)
            for wanted, function in fwd_hooks:
                if wanted == name:
                    function(x, hook=SimpleNamespace(name=name))


@pytest.mark.parametrize("company", [(), ("hook_last",)])
def test_hook_points_that_are_met_several_times_need_a_turn_too(tokenizer: Any, company: tuple[str, ...]) -> None:
    model, ids = Shared(tokenizer), torch.randint(4, 60, (2, 3))
    with pytest.raises(InputError, match=r"'block.hook_out' runs 3 times .* block.hook_out@0 \.\.\. block.hook_out@2"):
        ran(model, "block.hook_out", *company, ids=ids)
    for turn, added in ((0, 2), (1, 3), (2, 4), (-1, 4), (-3, 2)):
        assert torch.equal(ran(model, f"block.hook_out@{turn}", *company, ids=ids)[0], model.embed[ids] + added)
    model.met.clear()
    (joined,) = ran(model, "hook_embed+block.hook_out@1", ids=ids)
    assert torch.equal(joined, torch.cat([model.embed[ids] + 1, model.embed[ids] + 3], -1))
    assert model.met[5:] == ["hook_embed", "block.hook_out", "block.hook_out"]
    with pytest.raises(InputError, match="'hook_embed:in': a hook point has no input of its own"):
        ran(model, "hook_embed:in", ids=ids)


class Dropping(nn.Module):
    """A torch module with TransformerLens' interface, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.drop, self.hook_dict = nn.Embedding(66, 8), nn.Dropout(0.5), {"hook_embed": None}

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: Any = ()) -> None:
        for _, function in fwd_hooks:
            function(self.drop(self.table(tokens)), hook=None)


def test_hook_points_are_harvested_in_eval_mode_too() -> None:
    model, ids = Dropping().train(), torch.randint(4, 60, (2, 3))
    assert torch.equal(ran(model, "hook_embed", ids=ids)[0], model.table(ids))
    assert model.drop.training


# Encoders with decoders

_BART = {
    "vocab_size": 66, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
_T5 = {
    "vocab_size": 66, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
# Inside it works on (length, batch, width).
_FSMT = {k: v for k, v in _BART.items() if k != "vocab_size"} | {
    "langs": ["a", "b"], "src_vocab_size": 66, "tgt_vocab_size": 66
}  # fmt: skip
# Name -> class, config, settings, and what stands before the paths of encoder and decoder.
TRANSLATORS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART, "model."),
    "bart without a head": ("BartModel", "BartConfig", _BART, ""),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5, ""),
    "t5 without a head": ("T5Model", "T5Config", _T5, ""),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", _T5, ""),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", _T5, ""),
    "longt5": ("LongT5ForConditionalGeneration", "LongT5Config", _T5, ""),
    "switch of t5": ("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", _T5, ""),
    "fsmt": ("FSMTForConditionalGeneration", "FSMTConfig", _FSMT, "model."),
    "marian": ("MarianMTModel", "MarianConfig", _BART | {"decoder_start_token_id": 1}, "model."),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", _BART | {"decoder_start_token_id": 1}, "model."),
    "m2m100": ("M2M100ForConditionalGeneration", "M2M100Config", _BART, "model."),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", _BART | {"decoder_start_token_id": 3}, "model."),
    "blenderbot": ("BlenderbotForConditionalGeneration", "BlenderbotConfig", _BART, "model."),
}


def translator(name: str, **changes: Any) -> tuple[Any, str, int]:
    """The model, its prefix of paths and its padding token."""
    transformers = pytest.importorskip("transformers")
    kind, config_name, settings, prefix = TRANSLATORS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config_name)(**settings | changes)).eval()
    return model, prefix, settings["pad_token_id"]


def block_of(name: str) -> str:
    return "block" if "t5" in name else "layers"


@pytest.mark.parametrize("name", TRANSLATORS)
def test_decoder_rows_are_of_the_tokens_they_are_stored_with(name: str) -> None:
    model, prefix, pad = translator(name)
    ids, mask = padded(pad=pad)
    start = model.config.decoder_start_token_id
    hooks = [f"{prefix}{part}.{block_of(name)}.{n}" for part in ("encoder", "decoder") for n in (0, 1)]
    hooks.append(f"{prefix}decoder.embed_tokens")
    values = ran(model, *hooks, ids=ids, mask=mask)
    with torch.no_grad():
        for sequence, length in enumerate(mask.sum(1).tolist()):
            own = ids[sequence : sequence + 1, :length]
            read = torch.cat([torch.tensor([[start]]), own], 1)
            out = model(input_ids=own, decoder_input_ids=read, output_hidden_states=True, use_cache=False)
            wanted = [out.encoder_hidden_states[1], None, out.decoder_hidden_states[1][:, 1:], None]
            for value, state in zip(values, wanted, strict=False):
                assert value.shape[:2] == ids.shape
                if state is not None:
                    assert torch.allclose(value[sequence, :length], state[0], atol=2e-6)
            embedded = model.get_submodule(hooks[-1])(own)[0]
            assert torch.equal(values[-1][sequence, :length], embedded)


@pytest.mark.parametrize("name", ["bart", "t5", "mt5", "marian", "pegasus", "m2m100", "blenderbot"])
def test_decoder_inputs_are_those_of_the_models_own_shift(name: str) -> None:
    model, prefix, _ = translator(name)
    ids, seen = torch.randint(4, 60, (2, 5)), []
    model.get_submodule(f"{prefix}decoder").register_forward_pre_hook(
        lambda _m, _args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    with torch.no_grad():
        # One label more, so that the last token is read too.
        model(input_ids=ids, labels=torch.cat([ids, ids[:, :1]], 1))
    ran(model, f"{prefix}decoder.{block_of(name)}.0", ids=ids)
    assert seen[-1] == seen[0]


def test_rows_of_a_harvest_of_both_halves_belong_to_its_tokens(tokenizer: Any) -> None:
    """Of the case from the field: 0 of 1636 decoder rows were of the token stored with them."""
    model, _, _ = translator("bart")
    hooks = ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "model.decoder.layers.1")
    made = config(*hooks, keep_special_tokens=True)
    n = 0
    for batch in harvest_batches(made, model=model, tokenizer=tokenizer, text=tiny_models.documents(40)):
        own = torch.tensor(
            [batch.window.ids[s][p] for s, p in zip(batch.seq.tolist(), batch.pos.tolist(), strict=True)]
        )
        for hook in hooks[:2]:
            assert torch.equal(batch.rows[hook], model.get_submodule(hook)(own))
        assert batch.rows[hooks[2]].shape == (len(own), 16)
        n += len(own)
    assert n > 400


class Halves(nn.Module):
    """An encoder and a decoder with one embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=True, decoder_start_token_id=3)
        self.shared, self.encoder, self.decoder = nn.Embedding(66, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor,
        attention_mask: Any = None,
        decoder_attention_mask: Any = None,
    ) -> Tensor:
        memory = self.encoder(self.shared(input_ids)).mean(1, keepdim=True)
        return self.decoder(self.shared(decoder_input_ids) + memory)

    def get_encoder(self) -> nn.Module:
        return self.encoder


def test_a_module_that_both_halves_call_has_a_turn_for_each() -> None:
    model, ids = Halves(), torch.randint(4, 60, (2, 5))
    with pytest.raises(InputError, match=r"'shared' runs 2 times .* name the turn, shared@0 \.\.\. shared@1"):
        ran(model, "shared", ids=ids)
    for turn in (0, 1, -1, -2):
        assert torch.equal(ran(model, f"shared@{turn}", ids=ids)[0], model.shared(ids))


def test_what_a_decoder_attends_to_is_of_the_encoders_tokens() -> None:
    model, _, _ = translator("t5")
    ids, keys = torch.randint(4, 60, (2, 5)), "decoder.block.0.layer.1.EncDecAttention.k"
    read, made = ran(model, "encoder.final_layer_norm", keys, ids=ids)
    with torch.no_grad():
        assert torch.allclose(made, model.get_submodule(keys)(read), atol=1e-6)


def test_a_start_token_that_is_not_known_is_asked_for_unless_all_hooks_are_in_the_encoder() -> None:
    model, _, _ = translator("t5")
    inside = ran(model, "encoder.block.1")[0]
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(InputError, match="T5ForConditionalGeneration does not say with which token its decoder begins"):
        runner_for(model, ["encoder.block.1", "decoder.block.1"])
    assert torch.equal(ran(model, "encoder.block.1")[0], inside)
    model.generation_config.decoder_start_token_id = 0
    assert ran(model, "decoder.block.1")[0].shape == (4, 6, 16)


def test_a_text_as_long_as_the_decoder_has_positions_is_refused_but_not_for_the_encoder() -> None:
    model, _, _ = translator("bart")
    ids = torch.randint(4, 60, (1, 32))
    with pytest.raises(InputError, match=r"32 tokens are 33 with .* at most 32: lower ctx_len to 31"):
        ran(model, "model.decoder.layers.1", ids=ids)
    assert ran(model, "model.encoder.layers.1", ids=ids)[0].shape == (1, 32, 16)
    assert ran(model, "model.decoder.layers.1", ids=ids[:, :31])[0].shape == (1, 31, 16)


_LED = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 8}
_PROPHET = {
    "vocab_size": 66, "hidden_size": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_encoder_layers": 1,
    "num_decoder_layers": 1, "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2,
    "max_position_embeddings": 64, "decoder_start_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings", "hook", "shape"),
    [("LED", _BART | _LED, "encoder.layers.0", "1, 16, 16"), ("ProphetNet", _PROPHET, "decoder.layers.0", "1, 30, 16")],
)
def test_positions_that_are_no_tokens_of_the_text_are_refused(
    name: str, settings: dict[str, Any], hook: str, shape: str
) -> None:
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings)).eval()
    with pytest.raises(InputError, match=rf"hook '{hook}' gives shape \({shape}\) for \(1, 9\) tokens"):
        ran(model, hook, ids=padded()[0])


# Ids


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_one_line_before_the_model_runs(tokenizer: Any) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model, passes = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=30, **sizes)), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    options = {"model": model, "tokenizer": tokenizer, "text": ["w1 w2 w50"]}
    message = "the tokenizer gives token id 55, but the model's vocabulary ends at 29: take the tokenizer that belongs"
    with pytest.raises(InputError, match=message):
        list(harvest_batches(config("layers.1", prepend_bos=False), **options))
    # Padding that a tokenizer has added, and whoever runs a model themselves.
    with pytest.raises(InputError, match="token id 30 is given to a LlamaModel whose vocabulary ends at 29"):
        ran(model, "layers.1", ids=torch.tensor([[3, 30]]), mask=torch.tensor([[True, False]]))
    assert passes == []
