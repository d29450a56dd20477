"""Every architecture's training maths stated once more: dense (B, L) tensors, torch's autograd and Adam, no saefast.

Written to be read beside the papers, not to be fast. Tests hold the engines to it, and bench/architectures.py measures
against it. A statement is a function of parameters, rows and step; `train` is one plain loop for all of them.

Parameters by name: W_enc (L, D), W_dec (L, D_out), b_enc (L,), b_dec (D_out,), and an architecture's own. Sources:

    TopK, MultiTopK   Gao et al. 2024, arXiv 2406.04093
    BatchTopK         Bussmann et al. 2024, arXiv 2412.06410
    Matryoshka        Bussmann et al. 2025, arXiv 2503.17547
    HierarchicalTopK  Train One Sparse Autoencoder Across Multiple Sparsity Budgets, EMNLP 2025
    GroupMax          EleutherAI sparsify
    ReLU + L1         Bricken et al. 2023, Towards Monosemanticity; Templeton et al. 2024, Scaling Monosemanticity
    JumpReLU          Rajamanoharan et al. 2024, arXiv 2407.14435; Lieberum et al. 2024, arXiv 2408.05147 (Gemma Scope);
                      Conerly et al. 2025, Circuits Updates, January (tanh penalty and pre-activation loss)
    Gated             Rajamanoharan et al. 2024, arXiv 2404.16014
    transcoders       Dunefsky et al. 2024, arXiv 2406.11944; with a skip: Paulo et al. 2025, arXiv 2501.18823
    crosscoders       Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders
    cross-layer       Ameisen et al. 2025, transformer-circuits.pub/2025/attribution-graphs/methods.html
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]
# A constant, or a function of the step (from 0).
Coefficient = float | Callable[[int], float]


class Found(NamedTuple):
    """What a statement makes of a batch."""

    code: Tensor
    """(B, L) activations."""
    parts: list[tuple[float, Tensor]]
    """What reconstructs the target: how much the loss of each counts, and what it is (B, D_out)."""
    main: int = 0
    """The part that the SAE serves."""
    penalty: Tensor | float = 0.0
    """0-d: what is added to the loss besides, its coefficient included."""

    @property
    def x_hat(self) -> Tensor:
        return self.parts[self.main][1]

    @property
    def l0(self) -> Tensor:
        """Mean over tokens of the number of activations above 0."""
        return (self.code > 0).sum(dim=1).to(self.code.dtype).mean()


Statement = Callable[[Parameters, Tensor, int], Found]


def at(coef: Coefficient, step: int) -> float:
    return coef(step) if callable(coef) else coef


def pre_activations(p: Parameters, x: Tensor, centred: bool = True) -> Tensor:
    """(B, L). SAEs subtract b_dec from what they encode; transcoders and crosscoders do not."""
    return (x - p["b_dec"] if centred else x) @ p["W_enc"].T + p["b_enc"]


def decode(p: Parameters, code: Tensor) -> Tensor:
    return code @ p["W_dec"] + p["b_dec"]


def decoder_norms(p: Parameters, blocks: int = 1) -> Tensor:
    """(L,) Σ over blocks of columns (a crosscoder's layers) of the norm of a latent's decoder row in it."""
    return sum(block.norm(dim=1) for block in p["W_dec"].chunk(blocks, dim=1))  # type: ignore[return-value]


# Which pre-activations become the code.


def best_of_row(pre: Tensor, k: int, rank: Tensor | None = None) -> Tensor:
    """The k largest of each row after ReLU, 0 elsewhere; the largest by `rank` (B, L), where that is given."""
    idx = (pre if rank is None else rank).topk(k, dim=1).indices
    return torch.zeros_like(pre).scatter(1, idx, pre.gather(1, idx).relu())


def best_of_batch(pre: Tensor, k: int, rank: Tensor | None = None) -> Tensor:
    """The k · B largest of all after ReLU, 0 elsewhere."""
    idx = (pre if rank is None else rank).relu().flatten().topk(k * len(pre)).indices
    flat = pre.flatten()
    return torch.zeros_like(flat).scatter(0, idx, flat[idx].relu()).view_as(pre)


def best_of_group(pre: Tensor, k: int) -> Tensor:
    """The largest of each of k groups of L / k neighbours after ReLU, 0 elsewhere."""
    groups = pre.relu().unflatten(1, (k, -1))
    largest, idx = groups.max(dim=2, keepdim=True)
    return torch.zeros_like(groups).scatter(2, idx, largest).flatten(1)


# The TopK family.


def topk(k: int, *, multi: float = 0.0, centred: bool = True) -> Statement:
    """multi: the weight of the reconstruction from 4k latents (MultiTopK, in units of this statement's loss)."""

    def statement(p: Parameters, x: Tensor, step: int) -> Found:
        pre = pre_activations(p, x, centred)
        code = best_of_row(pre, k)
        parts = [(1.0, decode(p, code))]
        if multi:
            parts.append((multi, decode(p, best_of_row(pre, min(4 * k, pre.shape[1])))))
        return Found(code, parts)

    return statement


def batch_topk(k: int, *, centred: bool = True) -> Statement:
    def statement(p: Parameters, x: Tensor, step: int) -> Found:
        code = best_of_batch(pre_activations(p, x, centred), k)
        return Found(code, [(1.0, decode(p, code))])

    return statement


def group_max(k: int, *, centred: bool = True) -> Statement:
    def statement(p: Parameters, x: Tensor, step: int) -> Found:
        code = best_of_group(pre_activations(p, x, centred), k)
        return Found(code, [(1.0, decode(p, code))])

    return statement


def matryoshka(k: int, widths: Sequence[int], *, batch: bool = False, weights: Sequence[float] = ()) -> Statement:
    """widths: of the nested dictionaries, ascending, the whole one last; the paper adds up their losses."""

    def statement(p: Parameters, x: Tensor, step: int) -> Found:
        code = (best_of_batch if batch else best_of_row)(pre_activations(p, x), k)
        x_hat, parts = p["b_dec"].expand_as(x), []
        for weight, (begin, end) in zip(weights or [1.0] * len(widths), nested(widths), strict=True):
            x_hat = x_hat + code[:, begin:end] @ p["W_dec"][begin:end]
            parts.append((weight, x_hat))
        return Found(code, parts, main=len(parts) - 1)

    return statement


def hierarchical_topk(ks: Sequence[int], weights: Sequence[float] = (), *, served: int | None = None) -> Statement:
    """Each of the budgets ks, ascending, reconstructs from the ks[i] best latents; the mean of their losses.

    served: the budget that the SAE serves; None is the last.
    """
    main = len(ks) - 1 if served is None else list(ks).index(served)

    def statement(p: Parameters, x: Tensor, step: int) -> Found:
        pre = pre_activations(p, x)
        shares = weights or [1 / len(ks)] * len(ks)
        codes = [best_of_row(pre, k) for k in ks]
        parts = [(share, decode(p, code)) for share, code in zip(shares, codes, strict=True)]
        return Found(codes[main], parts, main=main)

    return statement


def nested(widths: Sequence[int]) -> Iterable[tuple[int, int]]:
    return itertools.pairwise([0, *widths])


# ReLU with L1.


def relu_l1(coef: Coefficient, *, by_norm: bool, centred: bool = True, blocks: int = 1) -> Statement:
    """mean over tokens of Σ acts (Bricken, with unit decoder rows), or of Σ acts · ‖w_dec‖ (Templeton, free norms).

    blocks: a crosscoder's layers, whose norms are added up.
    """

    def statement(p: Parameters, x: Tensor, step: int) -> Found:
        code = pre_activations(p, x, centred).relu()
        weighed = code * decoder_norms(p, blocks) if by_norm else code
        penalty = at(coef, step) * weighed.sum(dim=1).mean()
        return Found(code, [(1.0, decode(p, code))], penalty=penalty)

    return statement


# JumpReLU.


def window(pre: Tensor, threshold: Tensor, width: Tensor) -> Tensor:
    """The rectangle kernel, 1 / width within half a width of the threshold."""
    return ((pre - threshold).abs() < width / 2).to(pre.dtype) / width


class StraightThroughStep(torch.autograd.Function):
    """1 where pre > threshold. To the threshold -kernel, to pre nothing (arXiv 2407.14435), or with to_pre +kernel."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: Tensor, to_pre: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold, width)
        ctx.to_pre = to_pre
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        pre, threshold, width = ctx.saved_tensors
        slope = window(pre, threshold, width) * grad
        return slope if ctx.to_pre else None, -slope.sum_to_size(threshold.shape), None, None


class StraightThroughJumpReLU(torch.autograd.Function):
    """pre where pre > threshold, else 0. To the threshold -threshold · kernel, to pre 1 where it is on (arXiv
    2407.14435), with to_pre + threshold · kernel."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: Tensor, to_pre: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold, width)
        ctx.to_pre = to_pre
        return torch.where(pre > threshold, pre, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        pre, threshold, width = ctx.saved_tensors
        jump = threshold * window(pre, threshold, width) * grad
        on = torch.where(pre > threshold, grad, 0)
        return on + jump if ctx.to_pre else on, -jump.sum_to_size(threshold.shape), None, None


class Window(NamedTuple):
    """Through which a threshold gets its gradient."""

    width: float
    relative: bool = False
    """In units of the threshold."""
    to_pre: bool = False
    """Pre-activations get the estimate too (Anthropic; SAELens' ste_to_input)."""

    def of(self, threshold: Tensor) -> tuple[Tensor, bool]:
        wide = self.width * threshold.detach() if self.relative else torch.full_like(threshold, self.width)
        return wide, self.to_pre


def jump_relu_l0(
    coef: Coefficient, window: Window, *, target_l0: float | None = None, centred: bool = True
) -> Statement:
    """coef · L0, or with target_l0 coef · (L0 / target_l0 - 1)² (arXiv 2407.14435).

    Own parameter: log_threshold (L,).
    """

    def statement(p: Parameters, x: Tensor, step: int) -> Found:
        pre, threshold = pre_activations(p, x, centred), p["log_threshold"].exp()
        code = StraightThroughJumpReLU.apply(pre, threshold, *window.of(threshold))
        l0 = StraightThroughStep.apply(pre, threshold, *window.of(threshold)).sum(dim=1).mean()
        measured = l0 if target_l0 is None else (l0 / target_l0 - 1) ** 2
        return Found(code, [(1.0, decode(p, code))], penalty=at(coef, step) * measured)

    return statement


def jump_relu_tanh(coef: Coefficient, window: Window, *, slope: float, pre_act_coef: float) -> Statement:
    """coef · Σ tanh(slope · acts · ‖w_dec‖) + pre_act_coef · Σ ReLU(threshold - pre) · ‖w_dec‖, means over tokens.

    The second is over all latents, on or off, so that one whose pre-activations lie far below its threshold still has
    a gradient. Own parameter: log_threshold (L,).
    """

    def statement(p: Parameters, x: Tensor, step: int) -> Found:
        pre, threshold, norms = pre_activations(p, x), p["log_threshold"].exp(), decoder_norms(p)
        code = StraightThroughJumpReLU.apply(pre, threshold, *window.of(threshold))
        sparsity = torch.tanh(slope * code * norms).sum(dim=1).mean()
        below = ((threshold - pre).relu() * norms).sum(dim=1).mean()
        penalty = at(coef, step) * sparsity + pre_act_coef * below
        return Found(code, [(1.0, decode(p, code))], penalty=penalty)

    return statement


# Gated.


def gated(coef: Coefficient) -> Statement:
    """A gate decides which latents are on, a magnitude how much; both share W_enc (arXiv 2404.16014).

    gate = x W_encᵀ + b_enc; acts = 1[gate > 0] · ReLU(exp(r_mag) · x W_encᵀ + b_mag). Loss: the reconstruction; coef ·
    Σ ReLU(gate); and the reconstruction from ReLU(gate) by a decoder that gets no gradient from it.
    Own parameters: r_mag, b_mag (L,).
    """

    def statement(p: Parameters, x: Tensor, step: int) -> Found:
        gate = pre_activations(p, x)
        magnitude = (p["r_mag"].exp() * (gate - p["b_enc"]) + p["b_mag"]).relu()
        code, open_by = (gate > 0) * magnitude, gate.relu()
        frozen = {name: p[name].detach() for name in ("W_dec", "b_dec")}
        parts = [(1.0, decode(p, code)), (1.0, decode(frozen, open_by))]
        return Found(code, parts, penalty=at(coef, step) * open_by.sum(dim=1).mean())

    return statement


# What reads one thing and writes another.


def with_skip(statement: Statement) -> Statement:
    """A transcoder that also maps its input linearly. Own parameter: W_skip (D_out, D)."""

    def skipping(p: Parameters, x: Tensor, step: int) -> Found:
        found = statement(p, x, step)
        return found._replace(parts=[(weight, x_hat + x @ p["W_skip"].T) for weight, x_hat in found.parts])

    return skipping


def crosscoder_topk(k: int, blocks: int, *, batch: bool = False, centred: bool = False) -> Statement:
    """Rows of all layers side by side; latents are ranked by acts · Σ over layers of the norms of their rows."""

    def statement(p: Parameters, x: Tensor, step: int) -> Found:
        pre = pre_activations(p, x, centred)
        code = (best_of_batch if batch else best_of_row)(pre, k, (pre * decoder_norms(p, blocks)).detach())
        return Found(code, [(1.0, decode(p, code))])

    return statement


def cross_layer_topk(k: int, layers: int) -> Statement:
    """Each layer's k / layers best latents, of its own columns of x, decode into its own and all later outputs.

    W_enc (L, D / layers): a latent reads its layer's columns alone. W_dec (L, D_out): what is left of its layer's
    columns counts as 0.
    """

    def statement(p: Parameters, x: Tensor, step: int) -> Found:
        parts = zip(x.chunk(layers, dim=1), p["W_enc"].chunk(layers), p["b_enc"].chunk(layers), strict=True)
        code = torch.cat([best_of_row(rows @ W.T + b, k // layers) for rows, W, b in parts], dim=1)
        L, D = p["W_dec"].shape
        later = torch.ones(layers, layers).triu().to(p["W_dec"])
        later = later.repeat_interleave(L // layers, dim=0).repeat_interleave(D // layers, dim=1)
        return Found(code, [(1.0, code @ (p["W_dec"] * later) + p["b_dec"])])

    return statement


# Serving BatchTopK, where a token's code must not depend on those beside it.


def running(threshold: float | None, code: Tensor, decay: float = 0.99) -> float | None:
    """The moving average of the smallest activation above 0 of each batch's code; it begins at the first one's."""
    if not (code > 0).any():
        return threshold
    smallest = float(code.detach()[code > 0].min())
    return smallest if threshold is None else decay * threshold + (1 - decay) * smallest


def above(threshold: float, *, centred: bool = True) -> Statement:
    """What is served: all pre-activations above a threshold."""

    def statement(p: Parameters, x: Tensor, step: int) -> Found:
        pre = pre_activations(p, x, centred)
        code = torch.where(pre > threshold, pre, 0)
        return Found(code, [(1.0, decode(p, code))])

    return statement


# The loss, and training.


def reconstruction(target: Tensor, x_hat: Tensor, loss: str) -> Tensor:
    """ "sum": mean over tokens of Σ_d e². "fvu": Σe² / Σ(target - mean over tokens)²."""
    squares = (target - x_hat).square().sum()
    return squares / len(target) if loss == "sum" else squares / (target - target.mean(dim=0)).square().sum()


def total(found: Found, target: Tensor, loss: str) -> Tensor:
    return sum(weight * reconstruction(target, x_hat, loss) for weight, x_hat in found.parts) + found.penalty


class Recipe(NamedTuple):
    """How `train` goes about it."""

    lr: float
    steps: int
    """Which the decay ends at."""
    warmup: int = 0
    """Steps over which the rate rises linearly, the first one at lr / warmup."""
    decay_from: int | None = None
    """Step at which the rate begins to fall linearly to 0; None is never."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    loss: Literal["sum", "fvu"] = "sum"
    unit_rows: bool = True
    """Decoder rows: the gradient's part along each is taken out, and each is at unit norm after the step."""
    rates: Mapping[str, float] = {}
    """What the rate is multiplied by for a parameter, by name."""

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.decay_from is None or step < self.decay_from:
            return self.lr
        return self.lr * (self.steps - step) / (self.steps - self.decay_from)


class Trainer:
    """Dense training: parameters that it owns, gradients of all of them, torch's Adam.

    Attributes:
        p: the parameters by name, leaves that require a gradient.
        step_count: updates done.
    """

    def __init__(self, start: Parameters, statement: Statement, recipe: Recipe) -> None:
        self.p = {name: tensor.detach().clone().requires_grad_(True) for name, tensor in start.items()}
        self.statement, self.recipe, self.step_count = statement, recipe, 0
        groups = [{"params": [tensor]} for tensor in self.p.values()]
        self.adam = torch.optim.Adam(groups, lr=0.0, betas=recipe.betas, eps=recipe.eps, fused=True)

    def step(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Found]:
        """One update; the loss of before it, and what the batch became."""
        target, recipe = x if target is None else target, self.recipe
        found = self.statement(self.p, x, self.step_count)
        loss = total(found, target, recipe.loss)
        loss.backward()
        if recipe.unit_rows:
            self._project()
        for name, group in zip(self.p, self.adam.param_groups, strict=True):
            group["lr"] = recipe.rate(self.step_count) * recipe.rates.get(name, 1.0)
        self.adam.step()
        self.adam.zero_grad()
        if recipe.unit_rows:
            unit_rows_(self.p["W_dec"])
        self.step_count += 1
        return loss.detach(), found

    @torch.no_grad()
    def _project(self) -> None:
        W, grad = self.p["W_dec"], self.p["W_dec"].grad
        assert grad is not None
        grad -= (grad * W).sum(dim=1, keepdim=True) / W.square().sum(dim=1, keepdim=True) * W


@torch.no_grad()
def unit_rows_(W: Tensor) -> None:
    W /= W.norm(dim=1, keepdim=True)


def train(
    start: Parameters, batches: Iterable[Tensor], statement: Statement, recipe: Recipe
) -> tuple[dict[str, Tensor], list[float]]:
    """Trains an SAE on batches (B, D): its parameters then, and the loss at each step."""
    trainer = Trainer(start, statement, recipe)
    losses = [float(trainer.step(x)[0]) for x in batches]
    return {name: tensor.detach() for name, tensor in trainer.p.items()}, losses


def gradients(
    start: Parameters, statement: Statement, x: Tensor, target: Tensor | None = None, *, step: int = 0,
    loss: str = "sum",
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The loss of a batch, and its gradient by parameter's name (0 where it does not depend on one)."""
    p = {name: tensor.detach().clone().requires_grad_(True) for name, tensor in start.items()}
    value = total(statement(p, x, step), x if target is None else target, loss)
    found = torch.autograd.grad(value, list(p.values()), allow_unused=True, materialize_grads=True)
    return value.detach(), dict(zip(p, found, strict=True))


def rising(value: float, steps: int) -> Callable[[int], float]:
    """A coefficient that rises linearly over so many steps, the first one at value / steps (a warm-up)."""
    return lambda step: value * min((step + 1) / max(steps, 1), 1.0)


def log_of(threshold: float, n_latents: int, like: Tensor) -> Tensor:
    """JumpReLU's own parameter, all thresholds equal."""
    return torch.full((n_latents,), math.log(threshold), dtype=like.dtype, device=like.device)
