"""Where training starts an SAE: its pre-bias from data, weights from rows, and its encoder's scale."""

from typing import Any

import torch
from torch import Tensor

from saefast.models.architecture import At
from saefast.models.init import BiasInit, geometric_median, wide
from saefast.models.sae import SAE
from saefast.ops.code import padded
from saefast.ops.encoder import Encoder
from saefast.ops.reference import accumulate_dtype
from saefast.ops.spmm import spmm

# Latents at a time, so that a huge dictionary needs no more memory to begin than to train.
_LATENTS = 1 << 11
# Rows that the encoder's scale is fitted on, at most.
_FITTED = 2048
# Share of the variance of what begins in an active subspace.
_ACTIVE = 0.99


def start_b_dec_(sae: SAE, rows: Tensor, kind: BiasInit) -> None:
    """Sets the pre-bias from sample rows (n, d_in): 0, their mean, or their geometric median."""
    with torch.no_grad():
        if kind == "zeros":
            sae.b_dec.zero_()
        else:
            sae.b_dec.copy_(wide(rows).mean(0) if kind == "mean" else geometric_median(rows))


@torch.no_grad()
def scale_encoder_(sae: SAE, seed: int, n_directions: int = 256) -> None:
    """Divides W_enc by the mean norm that random unit vectors come back with (OpenAI sparse_autoencoder, train.py).

    The vectors are encoded around b_dec, so set that first.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_directions, sae.config.d_in, generator=generator, dtype=torch.float32, device="cpu")
    directions /= directions.norm(dim=1, keepdim=True)
    recovered = sae(directions.to(sae.device, sae.dtype) + sae.b_dec).x_hat - sae.b_dec
    sae.W_enc.div_(recovered.norm(dim=1).mean())


@torch.no_grad()
def start_from_rows_(sae: SAE, rows: Tensor, targets: Tensor, seed: int) -> None:
    """Weights that begin in the data: decoder rows point at rows, encoder rows tell these from others.

    Latent i begins at row j: W_dec is target j - b_dec at unit length, and W_enc is (C + λ)⁻¹ (x_j - mean) at unit
    length, C being the covariance of the rows and λ their mean variance times d_in / n. That is Fisher's linear
    discriminant (1936) of one row against the rest: rows have much in common, so their own directions would all fire on
    the same tokens. Where there are more latents than rows, the others begin at differences of two rows. What two equal
    rows leave without a direction stays as it was drawn. Latents begin in the columns that they read and write.

    Args:
        rows: (n, d_in) what is encoded. targets: (n, d_in) what it is to be mapped to; the rows themselves in an SAE.
        seed: of the choice of rows.
    """
    generator = torch.Generator().manual_seed(seed)
    x, t = wide(rows), wide(targets) - wide(sae.b_dec)
    for block in sae.architecture.blocks():
        b_enc = None if sae.config.apply_b_dec_to_input else sae.b_enc[block.latents]
        matrices = sae.W_enc[block.latents], sae.W_dec[block.latents, block.writes]
        _start_block(*matrices, b_enc, x[:, block.reads], t[:, block.writes], generator)


def _start_block(
    W_enc: Tensor, W_dec: Tensor, b_enc: Tensor | None, x: Tensor, t: Tensor, generator: torch.Generator
) -> None:
    """`start_from_rows_` for latents that read x (n, D) and write t (n, D_out): views of their weights are set."""
    mean = x.mean(0)
    x = x - mean
    telling = discriminant(x)
    n, L = len(x), len(W_enc)
    first = torch.randperm(n, generator=generator, dtype=torch.int64, device="cpu")[:L].to(x.device)
    for begin in range(0, L, _LATENTS):
        part = slice(begin, min(begin + _LATENTS, L))
        chosen = first[part]
        rest = 2, part.stop - begin - len(chosen)
        pairs = torch.randint(n, rest, generator=generator, dtype=torch.int64, device="cpu").to(x.device)
        for W, at, turned in ((W_dec, t, None), (W_enc, x, telling)):
            directions = torch.cat([at[chosen], at[pairs[0]] - at[pairs[1]]])
            _set_directions(W[part], directions if turned is None else directions @ turned)
        if b_enc is not None:
            b_enc[part] = -(W_enc[part].to(mean.dtype) @ mean).to(b_enc.dtype)


@torch.no_grad()
def start_in_subspace_(sae: SAE, rows: Tensor, targets: Tensor, seed: int) -> None:
    """Random weights within the leading principal components of the data (Wang et al. 2025, arXiv 2508.16929).

    Decoder rows are isotropic unit vectors in the `active_subspace` of the targets, and encoder rows are equal to them;
    those of what maps rows to other targets lie in the active subspace of the rows. Drawn over all of space, as they
    are elsewhere, many latents of an attention output would point where no data is, and stay dead. Data without a
    direction leaves what was drawn.

    Args: as `start_from_rows_`.
    """
    generator = torch.Generator().manual_seed(seed)
    x, t = wide(rows), wide(targets)
    for block in sae.architecture.blocks():
        read, written = x[:, block.reads], t[:, block.writes]
        W_enc, W_dec = sae.W_enc[block.latents], sae.W_dec[block.latents, block.writes]
        _draw_directions(W_dec, active_subspace(written), generator)
        if read.shape == written.shape and torch.equal(read, written):
            W_enc.copy_(W_dec)
        else:
            _draw_directions(W_enc, active_subspace(read), generator)
        if not sae.config.apply_b_dec_to_input:
            mean = read.mean(0)
            for begin in range(0, len(W_enc), _LATENTS):
                part = slice(begin, begin + _LATENTS)
                sae.b_enc[block.latents][part] = -(W_enc[part].to(mean.dtype) @ mean).to(sae.dtype)


def _draw_directions(W: Tensor, basis: Tensor, generator: torch.Generator) -> None:
    """The rows of W (n, D) become random directions in the span of a basis (r, D)."""
    for part in W.split(_LATENTS):
        drawn = torch.randn((len(part), len(basis)), generator=generator, dtype=torch.float32, device="cpu")
        _set_directions(part, drawn.to(basis.device, basis.dtype) @ basis)


def active_subspace(x: Tensor) -> Tensor:
    """(r, D) orthonormal: the fewest principal components that hold _ACTIVE of the variance of rows x (n, D)."""
    C = torch.cov(x.double().T, correction=0).reshape(x.shape[1], x.shape[1])
    variances, components = (t.flip(-1) for t in torch.linalg.eigh(C))
    variances = variances.clamp_min(0)
    r = int((variances.cumsum(0) < _ACTIVE * variances.sum()).sum()) + 1 if variances[0] > 0 else 0
    return components[:, :r].T.to(x.dtype)


def discriminant(x: Tensor) -> Tensor:
    """(C + λ)⁻¹ (D, D) for centred rows x (n, D): C = xᵀx / n, λ = tr C / n; worked out in float64."""
    C = x.double().T @ x.double() / len(x)
    ridge = C.diagonal().sum() / len(x)
    # Rows that are all equal have nothing to tell them apart.
    C.diagonal().add_(torch.where(ridge > 0, ridge, 1.0))
    return torch.linalg.inv(C).to(x.dtype)


def _set_directions(W: Tensor, directions: Tensor) -> None:
    """W (n, D) becomes the directions at unit length, but for those that are 0."""
    norms = directions.norm(dim=1, keepdim=True)
    W.copy_(torch.where(norms > 0, directions / norms, W.to(directions.dtype)))


@torch.no_grad()
def fit_encoder_(sae: SAE, rows: Tensor, targets: Tensor, train: Any) -> None:
    """Multiplies W_enc and b_enc by the number a with which the rows are reconstructed best.

    Activations are proportional to a, so that is least squares in closed form: a = Σ t · t_hat / Σ t_hat², t being
    target - b_dec and t_hat what the code of now decodes to. The error is at most what b_dec alone leaves. Where t_hat
    points away from t no number above 0 helps, and nothing is changed.

    Args:
        rows, targets: (n, d_in) as in `start_from_rows_`.
        train: a TrainConfig: the code is that of training.
    """
    dtype = accumulate_dtype(sae.dtype)
    x, t = rows[:_FITTED].to(dtype), targets[:_FITTED].to(dtype) - sae.b_dec.to(dtype)
    x = x - sae.b_dec.to(dtype) if sae.config.apply_b_dec_to_input else x
    ranks = sae.architecture.ranks_by_norm
    norms = sae.architecture.norms(sae.W_dec.detach()).sum(1).to(dtype) if ranks else None
    W_enc = sae.W_enc.detach()
    shadow = W_enc if W_enc.dtype != dtype else None
    encoder = Encoder(x, W_enc, sae.b_enc.detach().to(dtype), norms, shadow)
    if sae.architecture.pointwise is None:
        code = padded(sae.architecture.code(encoder, train, At(0, 1)), sae.config.n_latents)
    else:
        code = encoder.topk(sae.config.k)  # where a token's latents do not compete, it is to have so many in the end
    t_hat = spmm(code.acts, code.idx, sae.W_dec.detach()).to(dtype)
    squares, along = float(t_hat.double().square().sum()), float((t.double() * t_hat.double()).sum())
    if squares > 0 and along > 0:
        sae.W_enc.mul_(along / squares)
        sae.b_enc.mul_(along / squares)
