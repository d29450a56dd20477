"""The peers' training steps stated a second time: dense (B, L) maths in plain torch, Adam by hand, no saefast.

One function per recipe. Each takes weights it may change, batches and settings, and returns what it did at every step.
Sources: OpenAI sparse_autoencoder (train.py), EleutherAI sparsify 1.3.3 (sparse_coder.py, trainer.py),
dictionary_learning 0.1.0 (trainers/{top_k,batch_top_k,matryoshka_batch_top_k}.py) and SAELens 6.54
(saes/{topk,batchtopk,matryoshka_batchtopk}_sae.py, training/sae_trainer.py).

The last two take `batch` (BatchTopK: the k·B largest of the whole batch, instead of k a row) and `widths` (Matryoshka:
prefixes of the dictionary that reconstruct alone, ascending, the last one all of it). Neither package has Matryoshka
with k a row; the statement of it is that package's prefix loss over its own TopK.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

D, L, K, B, STEPS = 32, 256, 6, 128, 25


# Two correct fp32 runs differ by some 1e-7 of the largest pre-activation. Where the last latent chosen leads the first
# one not chosen by less than this share of it, they may choose differently, and then everything after differs.
CLEAR = 2e-6


class Gaps:
    """By how much every choice of latents was clear, noted by `best` as the statements below run."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.now: Tensor | None = None

    def see(self, values: Tensor, k: int) -> None:
        if k < values.shape[1]:
            top, scale = values.topk(k + 1, dim=1).values, values[values.isfinite()].abs().max()
            gap = (top[:, k - 1] - top[:, k]) / scale
            self.now = gap if self.now is None else torch.minimum(self.now, gap)

    def see_batch(self, values: Tensor, n: int) -> None:
        """As `see`, for the n largest of all values: the rows of the last in and the first out share the gap."""
        if n < values.numel():
            top, scale = values.flatten().topk(n + 1), values[values.isfinite()].abs().max()
            gap = torch.full((len(values),), torch.inf, dtype=values.dtype)
            gap[top.indices[n - 1 :] // values.shape[1]] = (top.values[n - 1] - top.values[n]) / scale
            self.now = gap if self.now is None else torch.minimum(self.now, gap)

    def end_step(self) -> None:
        assert self.now is not None
        self.steps.append(self.now)
        self.now = None


GAPS = Gaps()


def batches(seed: int, mean: float = 1.0, n: int = STEPS) -> list[Tensor]:
    """n float64 batches of rows with structure to learn and column means of about `mean`."""
    g = torch.Generator().manual_seed(seed)
    sources, means = (torch.randn(rows, D, generator=g, dtype=torch.float64) for rows in (100, 1))
    on = torch.rand(n, B, 100, generator=g, dtype=torch.float64) < 0.05
    code = torch.rand(n, B, 100, generator=g, dtype=torch.float64) * on
    return list(code @ sources + 0.1 * torch.randn(n, B, D, generator=g, dtype=torch.float64) + mean * means)


def clear_batches(train: Callable[[list[Tensor]], Any], mean: float = 1.0) -> list[Tensor]:
    """Batches on which `train`, a float64 run of a statement below, meets no near tie in any choice.

    Rows that meet one are exchanged, first step first, until a run meets none.
    """
    data = batches(0, mean, STEPS + 10)
    data, spare = data[:STEPS], iter(torch.cat(data[STEPS:]))
    for _ in range(10 * STEPS):
        GAPS.steps.clear()
        train(data)
        close = next(((step, gap < CLEAR) for step, gap in enumerate(GAPS.steps) if gap.min() < CLEAR), None)
        if close is None:
            return data
        for row in close[1].nonzero():
            data[close[0]][row] = next(spare)
    raise AssertionError(f"near ties in {10 * STEPS} runs")


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return float((a.detach() - b.detach()).abs().max() / b.detach().abs().max())


class Weights:
    """Four leaf tensors. W_enc, W_dec (L, D); b_enc (L,); b_dec (D,)."""

    def __init__(self, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor) -> None:
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = (
            t.detach().clone().requires_grad_(True) for t in (W_enc, W_dec, b_enc, b_dec)
        )
        self.averages = [torch.zeros_like(t, requires_grad=False) for t in self.all()]

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
    threshold: float = -1.0
    """BatchTopK's running threshold after the step."""


def best(values: Tensor, k: int) -> Tensor:
    """(B, L) bool: the k largest of each row."""
    GAPS.see(values.detach(), k)
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, values.topk(k, dim=1).indices, True)


def best_of_batch(values: Tensor, n: int) -> Tensor:
    """(B, L) bool: the n largest of all rows together."""
    GAPS.see_batch(values.detach(), n)
    chosen = torch.zeros(values.numel(), dtype=torch.bool)
    chosen[values.flatten().topk(n).indices] = True
    return chosen.view_as(values)


def choose(values: Tensor, k: int, batch: bool) -> Tensor:
    """(B, L) bool: the k largest of each row, or with `batch` as many of the batch as that makes."""
    return best_of_batch(values, k * len(values)) if batch else best(values, k)


def best_among(values: Tensor, dead: Tensor, k: int) -> Tensor:
    """(B, L) bool: the k largest of each row that are dead, or all of those where there are fewer."""
    k = min(k, int(dead.sum()))
    return best(torch.where(dead, values, -torch.inf), k) & dead


def prefix_losses(w: Weights, x: Tensor, f: Tensor, widths: Sequence[int]) -> Tensor:
    """(G,) mean over rows of Σ_d (x - x_hat)², where x_hat decodes the first widths[g] latents of f (B, L)."""
    return torch.stack([((x - (f[:, :n] @ w.W_dec[:n] + w.b_dec)) ** 2).sum(dim=1).mean() for n in widths])


def smallest_positive(f: Tensor) -> float:
    return float(f.detach()[f > 0].min()) if (f > 0).any() else 0.0


def variance(x: Tensor) -> Tensor:
    return ((x - x.mean(dim=0, keepdim=True)) ** 2).sum()


def record(loss: Tensor, auxk: Tensor | float, dead: Tensor, threshold: float = -1.0) -> Record:
    GAPS.end_step()
    return Record(loss.item(), float(torch.as_tensor(auxk).detach()), int(dead.sum()), threshold)


def openai(
    w: Weights, batches: list[Tensor], *, k: int, k_aux: int, dead_steps: int, lr: float, mse_scale: float
) -> list[Record]:
    """Also leaves the bias-corrected moving average (0.999) in w.averages."""
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
        for average, tensor in zip(w.averages, w.all(), strict=True):
            average.mul_(0.999).add_(tensor.detach(), alpha=0.001)
        adam.step(lr)
        done.append(record(loss, auxk, dead))
    for average in w.averages:
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
    w: Weights, batches: list[Tensor], *, k: int, dead_tokens: int, lr: float, warmup: int, decay_start: int,
    total: int, batch: bool = False, widths: Sequence[int] = (), threshold_start: int = 1000,
) -> list[Record]:  # fmt: skip
    """With `batch` the threshold is -1 up to and including step `threshold_start` (from 0), and after it a moving
    average (0.999) that begins at the first smallest activation it sees. A prefix's loss counts 1/G² of G prefixes:
    its default weight is 1/G, and then the mean of the G is taken."""
    adam, tokens, done = Adam(w.all()), torch.zeros(len(w.b_enc), dtype=torch.long), []
    widths, threshold = widths or (len(w.b_enc),), -1.0
    for step, x in enumerate(batches):
        pre = (x - w.b_dec) @ w.W_enc.T + w.b_enc
        chosen = choose(pre, k, batch)
        f = pre.relu() * chosen
        if batch and step > threshold_start:
            lowest = smallest_positive(f)
            threshold = lowest if threshold < 0 else 0.999 * threshold + 0.001 * lowest
        e = x - (f @ w.W_dec + w.b_dec)
        fired = f > 0 if batch else chosen
        tokens = torch.where(fired.any(dim=0), 0, tokens + len(x))
        loss = (prefix_losses(w, x, f, widths) / len(widths)).mean()

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
        done.append(record(loss, auxk, dead, threshold))
    return done


def saelens(
    w: Weights, batches: list[Tensor], *, k: int, dead_passes: int, lr: float, warmup: int,
    batch: bool = False, widths: Sequence[int] = (),
) -> list[Record]:  # fmt: skip
    """Decoder norms stand in the graph here, as they do in the peer; saefast lets them cancel.

    With `batch` the threshold is a moving average (0.99) from 0, of every step, in units of pre-activation times norm.
    The losses of all prefixes are added up.
    """
    adam, passes, done = Adam(w.all()), torch.zeros(len(w.b_enc), dtype=torch.long), []
    widths, threshold = widths or (len(w.b_enc),), 0.0 if batch else -1.0
    for step, x in enumerate(batches):
        norms = w.W_dec.norm(dim=1)
        hidden = ((x - w.b_dec) @ w.W_enc.T + w.b_enc) * norms
        f = hidden.relu() * choose(hidden, k, batch)
        if batch and (f > 0).any():
            threshold = 0.99 * threshold + 0.01 * smallest_positive(f)
        e = x - ((f / norms) @ w.W_dec + w.b_dec)
        loss = prefix_losses(w, x, f / norms, widths).sum()

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
        done.append(record(loss, auxk, dead, threshold))
    return done
