"""Spliced language-model loss: identity, zero ablation, masking and both kinds of module output."""

import math
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
