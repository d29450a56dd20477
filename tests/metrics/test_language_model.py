"""Spliced language-model loss: identity, zero ablation, masking and both kinds of module output."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from saefast.errors import InputError
from saefast.metrics.language_model import (
    LM_METRICS,
    TokenBatch,
    _scores,
    batch_sequences,
    lm_scores,
    spliced,
    why_missing,
)
from saefast.places import Place

BOS = 0


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=BOS, eos_token_id=BOS
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # random weights of the usual size predict nothing; larger ones have something to lose
        for p in model.parameters():
            p.mul_(4)
    return model


def text(n: int = 6) -> list[Tensor]:
    return [torch.cat([torch.tensor([BOS]), torch.randint(1, 97, (5 + 3 * i,))]) for i in range(n)]


BLOCK = [Place("transformer.h.0")]


def test_identity_loses_nothing_and_zero_recovers_nothing(gpt2: nn.Module) -> None:
    batches = list(batch_sequences(text(), 4))
    same = lm_scores(gpt2, BLOCK, lambda x: x, batches, [BOS])
    assert list(same) == list(LM_METRICS)
    assert same["delta_loss"] == 0
    assert same["loss_recovered"] == 1
    assert same["kl_sae"] == 0
    assert same["kl_score"] == 1
    assert same["ce_zero"] != same["ce_clean"]
    zero = lm_scores(gpt2, BLOCK, torch.zeros_like, batches, [BOS])
    assert zero["loss_recovered"] == 0
    assert zero["kl_score"] == 0
    assert zero["kl_zero"] > 0
    assert zero["delta_loss"] == zero["ce_zero"] - zero["ce_clean"]


@torch.no_grad()
def test_values_equal_the_plain_definition(gpt2: nn.Module) -> None:
    sequences = text(3)
    noisy = torch.randn(16)
    scores = lm_scores(gpt2, BLOCK, lambda x: 0.9 * x + noisy, batch_sequences(sequences, 2), [BOS])
    clean_sum = noisy_sum = kl_sum = 0.0
    for ids in sequences:
        clean = gpt2(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        handle = gpt2.get_submodule(BLOCK[0].path).register_forward_hook(lambda _m, _a, out: _perturb(out, noisy))
        other = gpt2(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        handle.remove()
        for t in range(1, len(ids) - 1):  # position 0 is BOS
            clean_sum -= float(clean[t, ids[t + 1]])
            noisy_sum -= float(other[t, ids[t + 1]])
            kl_sum += float((clean[t].exp() * (clean[t] - other[t])).sum())
    n = sum(len(ids) - 2 for ids in sequences)
    assert scores["lm_tokens"] == n
    assert scores["ce_clean"] == pytest.approx(clean_sum / n, rel=1e-5)
    assert scores["delta_loss"] == pytest.approx((noisy_sum - clean_sum) / n, rel=1e-4)
    assert scores["kl_sae"] == pytest.approx(kl_sum / n, rel=1e-4)


def _perturb(output: Tensor | tuple[Tensor, ...], noisy: Tensor) -> Tensor | tuple[Tensor, ...]:
    """0.9 x + noisy everywhere but at BOS."""
    x = output if isinstance(output, Tensor) else output[0]
    y = torch.cat([x[:, :1], 0.9 * x[:, 1:] + noisy], 1)
    return y if isinstance(output, Tensor) else (y, *output[1:])


class Embed(nn.Module):
    """A model whose middle returns a tensor, a tuple or a list, as transformers 5 and 4 do."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.middle, self.head = Middle(kind), nn.Linear(8, 97)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        out = self.middle(input_ids)
        return SimpleNamespace(logits=self.head(out if isinstance(out, Tensor) else out[0]))


class Middle(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind, self.table = kind, nn.Embedding(97, 8)

    def forward(self, ids: Tensor) -> Tensor | tuple[Tensor, str] | list[Tensor | str]:
        x = self.table(ids)
        return x if self.kind is Tensor else self.kind([x, "kept"])


@pytest.mark.parametrize("kind", [Tensor, tuple, list])
def test_tensor_tuple_and_list_outputs(kind: type) -> None:
    model = Embed(kind)
    ids = torch.randint(1, 97, (2, 4))
    where = torch.tensor([[False, True, True, True], [False, True, False, True]])
    with spliced(model, Place("middle"), lambda x: x + 1, where):
        out = model.middle(ids)
    assert isinstance(out, kind)
    x = out if kind is Tensor else out[0]
    assert torch.equal(x, model.middle.table(ids) + where[..., None])
    assert kind is Tensor or out[1] == "kept"
    assert not model.middle._forward_hooks
    scores = lm_scores(model, [Place("middle")], lambda x: x, batch_sequences(text(2), 2), [BOS])
    assert scores["delta_loss"] == scores["kl_sae"] == 0
    assert scores["kl_zero"] > 0


PLACES = (
    ["transformer.h.0"], ["transformer.h.1:in"], ["transformer.h.0.attn"], ["transformer.h.1.mlp.c_proj:in"],
    ["transformer.h.0", "transformer.h.1.mlp:in"], ["transformer.wte", "transformer.h.1", "transformer.h.0.ln_2"],
)  # fmt: skip


@pytest.mark.parametrize("written", PLACES, ids="+".join)
def test_identity_loses_nothing_at_either_side_and_in_several_parts(gpt2: nn.Module, written: list[str]) -> None:
    places, widths = list(map(Place.read, written)), []

    def same(x: Tensor) -> Tensor:
        widths.append(x.shape[1])
        return x.clone()

    scores = lm_scores(gpt2, places, same, batch_sequences(text(), 4), [BOS])
    assert scores["delta_loss"] == scores["kl_sae"] == 0
    assert set(widths) == {sum(64 if "c_proj" in path else 16 for path in written)}
    # What stands there is replaced: another value costs something.
    other = lm_scores(gpt2, places, lambda x: -x, batch_sequences(text(), 4), [BOS])
    assert other["kl_sae"] > 0
    assert other["ce_clean"] == pytest.approx(scores["ce_clean"], rel=0.5)


def test_a_modules_input_is_the_output_before_it(gpt2: nn.Module) -> None:
    batches = list(batch_sequences(text(), 4))
    after, before = (
        lm_scores(gpt2, [place], lambda x: 0.5 * x + 1, batches, [BOS])
        for place in (Place("transformer.h.0"), Place("transformer.h.1", "in"))
    )
    assert after == before


@torch.no_grad()
def test_parts_are_those_of_the_untouched_model_each_in_its_own_place(gpt2: nn.Module) -> None:
    """By hand: x of both places from a clean pass, then each place gets its half of x̂ wherever a token is ordinary."""
    ids = text(4)[3][None]
    both = [Place("transformer.h.0"), Place("transformer.h.1")]
    mix = torch.randn(32, 32) / 8
    scores = lm_scores(gpt2, both, lambda x: x @ mix, [TokenBatch(ids, torch.ones_like(ids).bool())], [BOS])
    states = gpt2(input_ids=ids, output_hidden_states=True)
    kept: list[Tensor] = []
    handle = gpt2.get_submodule("transformer.h.1").register_forward_hook(
        lambda _m, _a, out: kept.append(out if isinstance(out, Tensor) else out[0])
    )
    gpt2(input_ids=ids)
    handle.remove()
    x_hat = torch.cat([states.hidden_states[1], kept[0]], -1) @ mix
    handles = [gpt2.get_submodule(place.path).register_forward_hook(_put(part))
               for place, part in zip(both, x_hat.split(16, -1), strict=True)]  # fmt: skip
    log_p = gpt2(input_ids=ids).logits[0].double().log_softmax(-1)
    for handle in handles:
        handle.remove()
    expected = -log_p[1:-1].gather(1, ids[0, 2:, None]).mean()
    assert scores["ce_sae"] == pytest.approx(float(expected), rel=1e-5)


def _put(part: Tensor) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    def hook(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        x = output if isinstance(output, Tensor) else output[0]
        y = torch.cat([x[:, :1], part[:, 1:]], 1)
        return y if isinstance(output, Tensor) else (y, *output[1:])

    return hook


class Looped(nn.Module):
    """Its block runs three times."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.block, self.head = nn.Embedding(97, 8), nn.Linear(8, 8), nn.Linear(8, 97)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.through(self.table(input_ids), {})))

    def through(self, x: Tensor, changed: dict[int, float]) -> Tensor:
        for turn in range(3):
            x = x + torch.tanh(changed.get(turn, 1.0) * self.block(x))
        return x


@torch.no_grad()
@pytest.mark.parametrize("turn", [0, 1, 2, -1, -3])
def test_the_turn_that_was_harvested_is_the_one_that_is_replaced(turn: int) -> None:
    model, ids = Looped(), text(3)[2][None]
    batch = TokenBatch(ids, torch.ones_like(ids).bool())
    scores = lm_scores(model, [Place("block", turn=turn)], lambda x: 0.5 * x, [batch])
    log_p = model.head(model.through(model.table(ids), {turn % 3: 0.5}))[0].double().log_softmax(-1)
    expected = -log_p[:-1].gather(1, ids[0, 1:, None]).mean()
    assert scores["ce_sae"] == pytest.approx(float(expected), rel=1e-6)
    assert lm_scores(model, [Place("block", turn=turn)], lambda x: x, [batch])["kl_sae"] == 0


def test_what_cannot_be_scored_is_one_line() -> None:
    batches = list(batch_sequences(text(2), 2))
    with pytest.raises(InputError, match=r"'block' runs 3 times .* name the turn, block@0 \.\.\. block@2"):
        lm_scores(Looped(), [Place("block")], lambda x: x, batches)
    with pytest.raises(InputError, match="'block@3': that module ran 3 times"):
        lm_scores(Looped(), [Place("block", turn=3)], lambda x: x, batches)
    with pytest.raises(InputError, match=r"gives \(2, 97\), expected activations"):
        lm_scores(Flat(), [Place("head")], lambda x: x, batches)
    model = Looped()
    model.config = SimpleNamespace(is_encoder_decoder=True)
    with pytest.raises(InputError, match=r"Looped is an encoder with a decoder: .* no next-token loss of a text alone"):
        lm_scores(model, [Place("block", turn=0)], lambda x: x, batches)
    model = Looped()
    model.get_input_embeddings = lambda: nn.Embedding(50, 8)
    large = [TokenBatch(torch.tensor([[1, 60, 2]]), torch.ones(1, 3, dtype=torch.bool))]
    with pytest.raises(InputError, match="token id 60 is given to a Looped whose vocabulary ends at 49"):
        lm_scores(model, [Place("block", turn=0)], lambda x: x, large)


class Flat(Looped):
    """Gives one row a sequence at its head."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        self.head(self.table(input_ids).mean(1))
        return super().forward(input_ids, attention_mask)


def test_a_model_in_train_mode_is_scored_without_dropout_and_has_its_modes_back(gpt2: nn.Module) -> None:
    batches = list(batch_sequences(text(), 4))
    quiet = lm_scores(gpt2, BLOCK, lambda x: 0.9 * x, batches, [BOS])
    gpt2.train()
    gpt2.get_submodule("transformer.h.1").eval()
    before = [module.training for module in gpt2.modules()]
    hooks = len(gpt2.get_submodule(BLOCK[0].path)._forward_hooks)
    try:
        assert lm_scores(gpt2, BLOCK, lambda x: 0.9 * x, batches, [BOS]) == quiet
        assert [module.training for module in gpt2.modules()] == before
        with pytest.raises(ZeroDivisionError):
            lm_scores(gpt2, BLOCK, lambda x: x / (1 // 0), batches, [BOS])
        assert [module.training for module in gpt2.modules()] == before
        assert len(gpt2.get_submodule(BLOCK[0].path)._forward_hooks) == hooks
    finally:
        gpt2.eval()


def test_padding_and_special_tokens_count_nowhere(gpt2: nn.Module) -> None:
    ids = torch.tensor([[BOS, 5, 6, 7, BOS, 8, 9]])
    padded = torch.cat([ids, torch.full((1, 4), BOS)], 1)
    mask = torch.arange(11)[None] < 7
    seen: list[int] = []

    def watch(x: Tensor) -> Tensor:
        seen.append(len(x))
        return 0.5 * x

    short = lm_scores(gpt2, BLOCK, watch, [TokenBatch(ids, torch.ones_like(ids).bool())], [BOS])
    long = lm_scores(gpt2, BLOCK, watch, [TokenBatch(padded, mask)], [BOS])
    assert seen == [5, 5]
    assert short["lm_tokens"] == long["lm_tokens"] == 3  # 5→6, 6→7, 8→9
    assert long == pytest.approx(short, rel=1e-5)


def test_nothing_to_score_is_said(gpt2: nn.Module) -> None:
    batch = TokenBatch(torch.tensor([[BOS, 3, BOS]]), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="no text to score"):
        lm_scores(gpt2, BLOCK, lambda x: x, [batch], [BOS])
    assert math.isfinite(lm_scores(gpt2, BLOCK, lambda x: x, [batch], [])["ce_clean"])


@pytest.mark.parametrize(("zero", "value"), [(5.0, 0.75), (4.0, None), (3.9, None)])
def test_where_zero_ablation_hurts_nothing_there_is_nothing_to_recover(zero: float, value: float | None) -> None:
    """CE(clean) 4 and CE(sae) 4.25; with CE(zero) below it the ratio would be 3.5, better than a perfect SAE's."""
    scores = _scores([4.0, 4.25, zero, 0.1, 0.4])
    if value is not None:
        assert scores["loss_recovered"] == value
        assert why_missing(scores) == {}
        return
    assert math.isnan(scores["loss_recovered"])
    assert why_missing(scores) == {
        "loss_recovered": "zero-ablation hurts nothing, ce_zero is not above ce_clean: there is no loss to recover"
    }
    assert why_missing({}) == {}
    assert "kl_zero is 0" in why_missing(_scores([4.0, 4.0, 5.0, 0.0, 0.0]))["kl_score"]
