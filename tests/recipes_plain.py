"""The peers' training steps stated a second time: dense (B, L) maths in plain torch, Adam by hand, no saefast.

One function per recipe. Each takes weights it may change, batches and settings, and returns what it did at every step.
Sources: OpenAI sparse_autoencoder (train.py), EleutherAI sparsify 1.3.3 (sparse_coder.py, trainer.py),
dictionary_learning 0.1.0 (trainers/top_k.py) and SAELens 6.54 (saes/topk_sae.py, training/sae_trainer.py).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

D, L, K, B, STEPS = 32, 256, 6, 128, 25


def batches(dtype: str, mean: float = 1.0) -> list[Tensor]:
    """STEPS batches of rows with structure to learn and column means of about `mean`."""
    sources = torch.randn(100, D)
    code = torch.rand(STEPS, B, 100) * (torch.rand(STEPS, B, 100) < 0.05)
    x = code @ sources + 0.1 * torch.randn(STEPS, B, D) + mean * torch.randn(D)
    return list(x.to(getattr(torch, dtype)))


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return float((a.detach() - b.detach()).abs().max() / b.detach().abs().max())


class Weights:
    """Four leaf tensors. W_enc, W_dec (L, D); b_enc (L,); b_dec (D,)."""

    def __init__(self, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor) -> None:
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = (
            t.detach().clone().requires_grad_(True) for t in (W_enc, W_dec, b_enc, b_dec)
        )

    def all(self) -> list[Tensor]:
        return [self.W_enc, self.W_dec, self.b_enc, self.b_dec]

    def unit_decoder(self) -> None:
        with torch.no_grad():
            self.W_dec /= (self.W_dec**2).sum(dim=1, keepdim=True).sqrt()

    def project(self) -> None:
        """Takes each decoder row's own direction out of its gradient."""
        grad, W = self.W_dec.grad, self.W_dec.detach()
        unit = W / W.norm(dim=1, keepdim=True)
        self.W_dec.grad = grad - torch.einsum("ld,ld->l", grad, unit)[:, None] * unit

    def clip(self, limit: float) -> None:
        norm = math.sqrt(sum(float(t.grad.double().pow(2).sum()) for t in self.all()))
        for t in self.all():
            t.grad = t.grad * min(1.0, limit / (norm + 1e-6))


class Adam:
    """Kingma & Ba 2015, algorithm 1, moments and bias corrections written out."""

    def __init__(self, tensors: list[Tensor], beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        self.tensors, self.beta1, self.beta2, self.eps, self.t = tensors, beta1, beta2, eps, 0
        self.m = [torch.zeros_like(t) for t in tensors]
        self.v = [torch.zeros_like(t) for t in tensors]

    def step(self, lr: float) -> None:
        self.t += 1
        with torch.no_grad():
            for i, tensor in enumerate(self.tensors):
                self.m[i] = self.beta1 * self.m[i] + (1 - self.beta1) * tensor.grad
                self.v[i] = self.beta2 * self.v[i] + (1 - self.beta2) * tensor.grad**2
                m_hat, v_hat = self.m[i] / (1 - self.beta1**self.t), self.v[i] / (1 - self.beta2**self.t)
                tensor -= lr * m_hat / (v_hat.sqrt() + self.eps)
                tensor.grad = None


class Record(NamedTuple):
    loss: float
    auxk: float
    n_dead: int


def best(values: Tensor, k: int) -> Tensor:
    """(B, L) bool: the k largest of each row."""
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, values.topk(k, dim=1).indices, True)


def best_among(values: Tensor, dead: Tensor, k: int) -> Tensor:
    """(B, L) bool: the k largest of each row that are dead, or all of those where there are fewer."""
    k = min(k, int(dead.sum()))
    return best(torch.where(dead, values, -torch.inf), k) & dead


def variance(x: Tensor) -> Tensor:
    return ((x - x.mean(dim=0, keepdim=True)) ** 2).sum()


def record(loss: Tensor, auxk: Tensor | float, dead: Tensor) -> Record:
    return Record(loss.item(), float(torch.as_tensor(auxk).detach()), int(dead.sum()))


def openai(
    w: Weights, batches: Iterable[Tensor], *, k: int, k_aux: int, dead_steps: int, lr: float, mse_scale: float,
    averages: list[Tensor],
) -> list[Record]:  # fmt: skip
    """`averages`: four zeros like the weights; afterwards the bias-corrected moving average (0.999)."""
    adam, last, done = Adam(w.all(), eps=6.25e-10), torch.zeros(len(w.b_enc), dtype=torch.long), []
    for x in batches:
        pre = (x - w.b_dec) @ w.W_enc.T + w.b_enc
        chosen = best(pre, k)
        x_hat = (pre.relu() * chosen) @ w.W_dec + w.b_dec

        fired = ((pre * chosen) > 1e-3).any(dim=0)
        last = torch.where(fired, 0, last) + 1
        dead = last > dead_steps
        aux_hat = (pre.relu() * best_among(pre, dead, k_aux)) @ w.W_dec + w.b_dec if dead.any() else 0 * x + w.b_dec
        target = x - x_hat.detach() + w.b_dec.detach()
        auxk = ((aux_hat - target) ** 2).mean() / ((target - target.mean(dim=0)) ** 2).mean()
        loss = mse_scale * ((x - x_hat) ** 2).mean() + auxk / 32

        loss.backward()
        w.unit_decoder()
        w.project()
        for average, tensor in zip(averages, w.all(), strict=True):
            average.mul_(0.999).add_(tensor.detach(), alpha=0.001)
        adam.step(lr)
        done.append(record(loss, auxk, dead))
    for average in averages:
        average /= 1 - 0.999 ** len(done)
    return done


def sparsify(
    w: Weights, batches: list[Tensor], *, k: int, dead_tokens: int, auxk_alpha: float, multi_topk: bool,
    lr: float, warmup: int, total: int, buggy: bool = False,
) -> list[Record]:  # fmt: skip
    """`buggy`: as published. AuxK and MultiTopK send the encoder no gradient, gradients pass its ReLU unhindered, and
    with MultiTopK the top 4k count as fired (the name of the top k's indices is used again for theirs)."""
    adam, tokens, done = Adam(w.all()), torch.zeros(len(w.b_enc), dtype=torch.long), []
    for step, x in enumerate(batches):
        w.unit_decoder()
        pre = (x - w.b_dec) @ w.W_enc.T + w.b_enc
        post = pre.relu()
        # Value of the ReLU, derivative 1.
        main = pre + (post - pre).detach() if buggy else post
        other = post.detach() if buggy else post
        chosen = best(pre, k)
        e = x - ((main * chosen) @ w.W_dec + w.b_dec)
        loss = (e**2).sum() / variance(x)

        dead, auxk = tokens > dead_tokens, torch.zeros(())
        if auxk_alpha > 0 and dead.any():
            n_dead, half = int(dead.sum()), x.shape[1] // 2
            e_hat = (other * best_among(pre, dead, half)) @ w.W_dec
            auxk = min(n_dead / half, 1) * ((e_hat - e.detach()) ** 2).sum() / variance(x)
            loss = loss + auxk_alpha * auxk
        if multi_topk:
            wide = (other * best(pre, 4 * k)) @ w.W_dec + w.b_dec
            loss = loss + ((wide - x) ** 2).sum() / variance(x) / 8

        loss.backward()
        w.project()
        adam.step(lr * (step / warmup if step < warmup else (total - step) / (total - warmup)))
        fired = best(pre, 4 * k) if buggy and multi_topk else chosen
        tokens = torch.where(fired.any(dim=0), 0, tokens + len(x))
        done.append(record(loss, auxk, dead))
    return done


def dictionary_learning(
    w: Weights, batches: list[Tensor], *, k: int, dead_tokens: int, lr: float, warmup: int, decay_start: int, total: int
) -> list[Record]:
    adam, tokens, done = Adam(w.all()), torch.zeros(len(w.b_enc), dtype=torch.long), []
    for step, x in enumerate(batches):
        pre = (x - w.b_dec) @ w.W_enc.T + w.b_enc
        chosen = best(pre, k)
        e = x - ((pre.relu() * chosen) @ w.W_dec + w.b_dec)
        tokens = torch.where(chosen.any(dim=0), 0, tokens + len(x))
        loss = (e**2).sum(dim=1).mean()

        dead, auxk = tokens >= dead_tokens, torch.zeros(())
        if dead.any():
            e_hat = (pre.relu() * best_among(pre, dead, x.shape[1] // 2)) @ w.W_dec
            auxk = ((e.detach() - e_hat) ** 2).sum(dim=1).mean() / (variance(e.detach()) / len(x))
            loss = loss + auxk / 32

        loss.backward()
        w.project()
        w.clip(1.0)
        rate = step / warmup if step < warmup else 1.0
        adam.step(lr * ((total - step) / (total - decay_start) if step >= decay_start else rate))
        w.unit_decoder()
        done.append(record(loss, auxk, dead))
    return done


def saelens(w: Weights, batches: list[Tensor], *, k: int, dead_passes: int, lr: float, warmup: int) -> list[Record]:
    """Decoder norms stand in the graph here, as they do in the peer; saefast lets them cancel."""
    adam, passes, done = Adam(w.all()), torch.zeros(len(w.b_enc), dtype=torch.long), []
    for step, x in enumerate(batches):
        norms = w.W_dec.norm(dim=1)
        hidden = ((x - w.b_dec) @ w.W_enc.T + w.b_enc) * norms
        chosen = best(hidden, k)
        f = hidden.relu() * chosen
        e = x - ((f / norms) @ w.W_dec + w.b_dec)
        loss = (e**2).sum(dim=1).mean()

        dead, auxk = passes > dead_passes, torch.zeros(())
        if dead.any():
            n_dead, half = int(dead.sum()), x.shape[1] // 2
            e_hat = ((hidden * best_among(hidden, dead, half)) / norms) @ w.W_dec
            auxk = min(n_dead / half, 1) * ((e_hat - e.detach()) ** 2).sum(dim=1).mean()
            loss = loss + auxk

        loss.backward()
        w.clip(1.0)
        adam.step(lr * ((step + 1) / warmup if step < warmup else 1.0))
        passes = torch.where((f > 0).any(dim=0), 0, passes + 1)
        done.append(record(loss, auxk, dead))
    return done
