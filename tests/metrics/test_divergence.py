"""The mean KL divergence of two passes: its value, its gradient, and which positions count."""

import pytest
import torch

from saefast.metrics import divergence
from saefast.metrics.divergence import mean_kl


def plain(logits: torch.Tensor, clean: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """By torch's own words."""
    p, log_q = clean[where].softmax(-1), logits[where].log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, p, reduction="batchmean")


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    logits, clean = (3 * torch.randn(2, 5, 7, generator=draws, dtype=torch.float64) for _ in range(2))
    return logits, clean, torch.rand(2, 5, generator=draws) < 0.6


def test_gradients(case, monkeypatch):
    logits, clean, where = case
    # Positions in several chunks, the last one short.
    monkeypatch.setattr(divergence, "_CHUNK", 3 * 7)
    assert where.sum() % 3 != 0
    assert torch.autograd.gradcheck(lambda x: mean_kl(x, clean, where), logits.requires_grad_())
    loss = mean_kl(logits, clean, where)
    assert loss.item() == pytest.approx(plain(logits, clean, where).item(), rel=1e-12)
    (2 * loss).backward()
    expected = torch.autograd.grad(2 * plain(logits, clean, where), logits)[0]
    assert torch.allclose(logits.grad, expected, atol=1e-14)
    assert not logits.grad[~where].any()


def test_halves_are_widened(case):
    logits, clean, where = (t if t.dtype == torch.bool else t.bfloat16() for t in case)
    loss = mean_kl(logits.requires_grad_(), clean, where)
    loss.backward()
    assert loss.dtype == torch.float32
    wide = logits.detach().float().requires_grad_()
    plain(wide, clean.float(), where).backward()
    assert loss.item() == pytest.approx(plain(wide, clean.float(), where).item(), rel=1e-5)
    assert torch.equal(logits.grad, wide.grad.bfloat16())


def test_nothing_changed_is_no_divergence(case):
    logits, _, where = case
    loss = mean_kl(logits.clone().requires_grad_(), logits, where)
    assert loss.item() == 0
    (grad,) = torch.autograd.grad(mean_kl(x := logits.clone().requires_grad_(), logits, where), x)
    assert not grad.any()
