"""Cross-layer transcoders: against a dense statement, both engines alike, layers that write nothing earlier, a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from classic import CLASSIC
from torch import Tensor

import saefast
from saefast.engines.autograd import AutogradEngine
from saefast.engines.base import PARAMETERS
from saefast.engines.fused import FusedEngine
from saefast.engines.recipe import choose
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.training.plan import Sizes, memory_of
from saefast.training.progress import read_metrics

# Layers, columns of each layer's input and output, its latents, and how many of them are on.
M, D, F, K, B = 3, 6, 16, 2, 40


def config(**changes: Any) -> SAEConfig:
    return SAEConfig(M * D, M * F, M * K, **(dict(n_layers=M) | changes))


def data(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs of three layers, and outputs that depend on their own layer's input and on those of earlier ones."""
    generator = torch.Generator().manual_seed(seed)
    code = torch.rand(n, M, 12, generator=generator) ** 8
    inputs, outputs = [], []
    for m in range(M):
        inputs.append(code[:, m] @ torch.randn(12, D, generator=generator))
        outputs.append(code[:, : m + 1].flatten(1) @ torch.randn((m + 1) * 12, D, generator=generator) + 1)
    return torch.cat(inputs, dim=1).to(dtype), torch.cat(outputs, dim=1).to(dtype)


class Plain:
    """The maths with a tensor for each pair of layers: no zeros anywhere, torch's autograd and Adam."""

    def __init__(self, sae: SAE, lr: float) -> None:
        self.enc = [w.detach().clone().requires_grad_() for w in sae.W_enc.split(F)]
        self.b_enc = [b.detach().clone().requires_grad_() for b in sae.b_enc.split(F)]
        self.b_dec = sae.b_dec.detach().clone().requires_grad_()
        self.dec = {
            (l, m): sae.W_dec.detach()[l * F : (l + 1) * F, m * D : (m + 1) * D].clone().requires_grad_()
            for l in range(M)  # noqa: E741
            for m in range(l, M)
        }
        everything = [*self.enc, *self.b_enc, self.b_dec, *self.dec.values()]
        self.adam = torch.optim.Adam(everything, lr=lr, betas=(0.9, 0.999), fused=True)

    def x_hat(self, x: Tensor) -> Tensor:
        codes = []
        for layer, rows in enumerate(x.split(D, dim=1)):
            pre = rows @ self.enc[layer].T + self.b_enc[layer]
            best = pre.topk(K, dim=1)
            codes.append(torch.zeros_like(pre).scatter(1, best.indices, best.values.relu()))
        outputs = [sum(codes[l] @ self.dec[l, m] for l in range(m + 1)) for m in range(M)]  # noqa: E741
        return torch.cat(outputs, dim=1) + self.b_dec  # type: ignore[arg-type]

    def step(self, x: Tensor, target: Tensor) -> float:
        loss = (target - self.x_hat(x)).square().sum() / len(x)
        loss.backward()
        self.adam.step()
        self.adam.zero_grad()
        return float(loss.detach())

    def W_dec(self) -> Tensor:
        whole = torch.zeros(M * F, M * D, dtype=self.b_dec.dtype)
        for (l, m), part in self.dec.items():  # noqa: E741
            whole[l * F : (l + 1) * F, m * D : (m + 1) * D] = part.detach()
        return whole


PLAIN: dict[str, Any] = dict(decoder_norm="never", project_decoder_grad=False, auxk_coef=0.0, resample_every=0)


def engine(kind: Any, **settings: Any) -> Any:
    settings = CLASSIC | dict(lr=3e-3, dead_after=3 * B, settle_every=1, auxk_coef=0.0) | settings
    own = {key: settings.pop(key) for key in ("init",) if key in settings}
    return kind(SAE(config(dtype="float64", **own), seed=3), saefast.TrainConfig(**settings), 60)


@pytest.mark.parametrize("kind", [FusedEngine, AutogradEngine])
def test_training_follows_the_dense_statement(kind: Any) -> None:
    ours = engine(kind, loss="sum", beta2=0.999, lr_decay_share=0.0, **PLAIN)
    plain = Plain(ours.sae, lr=3e-3)
    x, target = data(40 * B, torch.float64)
    for rows, wanted in zip(x.split(B), target.split(B), strict=True):
        assert float(ours.step(rows, wanted).loss) == pytest.approx(plain.step(rows, wanted), rel=1e-9)
    torch.testing.assert_close(ours.sae.W_dec.detach(), plain.W_dec(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        ours.sae.W_enc.detach(), torch.cat([w.detach() for w in plain.enc]), rtol=1e-8, atol=1e-10
    )
    torch.testing.assert_close(ours.sae(x[:9]).x_hat.detach(), plain.x_hat(x[:9]).detach())


SETTINGS: dict[str, dict[str, Any]] = {
    "ours": {},
    "free norms, clipped": dict(decoder_norm="never", project_decoder_grad=False, max_grad_norm=0.01),
    "averaged": dict(ema_decay=0.9, decoder_norm="pre_step"),
    "in the data": dict(init="rows", fit_encoder=True),
    "resampled": dict(resample_every=4, dead_after=2 * B, init="rows"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_both_engines_train_alike(name: str) -> None:
    x, target = (rows.split(B) for rows in data(40 * B, torch.float64))
    ours, plain = (engine(kind, **SETTINGS[name]) for kind in (FusedEngine, AutogradEngine))
    for one in (ours, plain):
        one.initialise(x[0], target[0])
    restarted = 0
    for rows, wanted in zip(x, target, strict=True):
        a, b = ours.step(rows, wanted), plain.step(rows, wanted)
        restarted += int((ours.dead.age == 0).sum())
        for figure in ("loss", "fvu", "l0", "dead_share", "grad_norm"):
            assert float(getattr(a, figure)) == pytest.approx(float(getattr(b, figure)), rel=1e-8), figure
    for parameter in PARAMETERS:
        a, b = (getattr(one.sae, parameter).detach() for one in (ours, plain))
        assert (a - b).abs().max() <= 1e-8 * b.abs().max(), parameter
    assert writes_nothing_earlier(ours.sae)
    assert name != "resampled" or restarted > 3, "nothing was resampled"


def writes_nothing_earlier(sae: SAE) -> bool:
    return all(bool((sae.W_dec[m * F : (m + 1) * F, : m * D] == 0).all()) for m in range(M))


def test_each_layer_has_its_own_best_and_writes_nothing_earlier() -> None:
    sae = SAE(config(dtype="float64"), seed=1)
    x, _ = data(30, torch.float64)
    assert writes_nothing_earlier(sae)
    torch.testing.assert_close(sae.decoder_norms(), torch.ones(M * F, dtype=torch.float64))
    acts, idx = sae.encode_sparse(x)
    for m in range(M):
        pre = x[:, m * D : (m + 1) * D] @ sae.W_enc[m * F : (m + 1) * F].T + sae.b_enc[m * F : (m + 1) * F]
        best = pre.topk(K, dim=1)
        mine = slice(m * K, (m + 1) * K)
        assert torch.equal(idx[:, mine].long(), best.indices + m * F)
        torch.testing.assert_close(acts[:, mine], best.values.relu())
    # The first output depends on the first input alone, the last on all of them.
    x = x.requires_grad_()
    first, last = (
        torch.autograd.grad(sae(x).x_hat[:, columns].sum(), x)[0] for columns in (slice(0, D), slice(-D, None))
    )
    assert bool((first[:, D:] == 0).all())
    assert all(bool((part != 0).any()) for part in last.split(D, dim=1))


def test_gradients_of_what_is_served() -> None:
    sae = SAE(config(dtype="float64"), seed=1)
    x = data(4, torch.float64)[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sae(x).x_hat, (x,))


def loud(rows: Tensor) -> Tensor:
    return rows * torch.tensor([1e-2, 1.0, 30.0]).repeat_interleave(D)


def settings(**changes: Any) -> saefast.TrainConfig:
    return saefast.TrainConfig(**(dict(n_tokens=8000, batch_size=B, lr=5e-3, save_every=0) | changes))


@pytest.mark.parametrize("engine_name", ["fused", "autograd"])
def test_every_layer_counts_alike_whatever_its_scale(tmp_path: Path, engine_name: str) -> None:
    x, target = data(2000)
    sae = saefast.train(
        {"x": loud(x), "target": loud(target.flip(1)).flip(1)}, config(), settings(engine=engine_name), tmp_path / "run"
    )
    y = loud(target.flip(1)).flip(1)
    found = [
        float((a - b).square().sum() / (a - a.mean(0)).square().sum())
        for a, b in zip(y.split(D, dim=1), sae(loud(x)).x_hat.detach().split(D, dim=1), strict=True)
    ]
    assert max(found) < 0.6
    assert writes_nothing_earlier(sae)
    # What the run measured on scaled rows is what the SAE gives for raw ones.
    levels = sae.architecture.levels(dict(sae.named_buffers()))
    held, given = y[-100:] * levels, sae(loud(x)[-100:]).x_hat.detach() * levels
    expected = read_metrics(tmp_path / "run")[-1]["heldout/fvu"]
    assert float((held - given).square().sum() / (held - held.mean(0)).square().sum()) == pytest.approx(
        expected, rel=1e-3
    )


@pytest.mark.parametrize("options", [{}, dict(optimizer="adam-lean"), dict(engine="autograd")], ids=str)
def test_a_run_is_saved_loaded_and_resumed(options: dict[str, Any], tmp_path: Path) -> None:
    x, target = data(1000)
    rows, train = {"x": loud(x), "target": loud(target)}, settings(n_tokens=1600, save_every=6, **options)

    class Stop(Exception):
        pass

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 20:
            raise Stop

    whole = saefast.train(rows, config(), train, tmp_path / "whole")
    with pytest.raises(Stop):
        saefast.train(rows, config(), train, tmp_path / "cut", on_log=stop)
    resumed = saefast.train(rows, config(), train, tmp_path / "cut", resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    loaded = saefast.load(tmp_path / "whole")
    assert torch.equal(loaded(x[:50]).x_hat, whole(x[:50]).x_hat)
    assert writes_nothing_earlier(loaded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_layers=1), "n_layers is 1: expected at least 2 layers; one layer is a transcoder"),
        (dict(n_layers=4), r"d_in is 18, which 4 layers \(n_layers\) cannot share: expected a multiple of 4"),
        (dict(k=32), r"k is 32, which 3 layers \(n_layers\) cannot share: expected a multiple of 3"),
        (
            dict(activation="batchtopk"),
            r"activation is 'batchtopk', but a cross-layer transcoder \(n_layers = 3\) takes",
        ),
        (dict(matryoshka=(8,)), r"matryoshka is \(8,\), which a cross-layer transcoder \(n_layers = 3\) has not"),
        (dict(crosscode_widths=(6, 12)), r"crosscode_widths is \(6, 12\), which a cross-layer transcoder"),
        (dict(skip=True), r"skip is True, which a cross-layer transcoder \(n_layers = 3\) has not: leave it out"),
        (dict(d_out=20), r"d_out is 20, which 3 layers \(n_layers\) cannot share"),
    ],
)
def test_what_cannot_be_a_cross_layer_transcoder(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SAEConfig(**(dict(d_in=18, n_latents=48, k=6, n_layers=3) | changes))


def test_what_does_not_train_one() -> None:
    with pytest.raises(InputError, match=r"auxk_coef is 0\.5, which a cross-layer transcoder has not: set it to 0"):
        engine(FusedEngine, auxk_coef=0.5)


def test_the_plan_counts_what_each_layer_reads_and_writes() -> None:
    sae_config = SAEConfig(3 * 64, 3 * 256, 3 * 8, n_layers=3, d_out=3 * 32)
    sizes = Sizes.of(sae_config, choose(sae_config, saefast.TrainConfig(), n_rows=1 << 20))
    weights = sum(matrix.numel() for matrix in (SAE(sae_config).W_enc, SAE(sae_config).W_dec))
    found = memory_of(sizes, "cpu")
    assert found["weights"] == 4 * weights == 4 * 3 * 256 * (64 + 3 * 32)
    # A copy of the residuals for each layer, besides.
    alone = memory_of(sizes._replace(blocks=1), "cpu")
    assert found["batch"] - alone["batch"] == 3 * sizes.batch_size * 3 * 32 * 4


def with_thresholds(activation: str, dtype: str = "float64") -> SAE:
    """One as others publish it, with biases and thresholds that some pre-activations pass."""
    sae = SAE(config(activation=activation, dtype=dtype), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_dec):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
        if activation == "jumprelu":
            sae.log_threshold.copy_(torch.rand(M * F, generator=generator).log())
    return sae


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_one_with_thresholds_is_served_layer_by_layer(activation: str) -> None:
    sae, x = with_thresholds(activation), data(30, torch.float64)[0]
    found, expected = sae.encode(x).detach(), []
    for m, rows in enumerate(x.split(D, dim=1)):
        mine = slice(m * F, (m + 1) * F)
        pre = rows @ sae.W_enc[mine].T + sae.b_enc[mine]
        limit = sae.log_threshold[mine].exp() if activation == "jumprelu" else torch.zeros(F, dtype=x.dtype)
        expected.append(torch.where(pre > limit, pre, 0))
    code = torch.cat(expected, dim=1).detach()
    assert len(set((code > 0).sum(1).tolist())) > 2
    torch.testing.assert_close(found, code)
    torch.testing.assert_close(sae(x).x_hat.detach(), (code @ sae.W_dec + sae.b_dec).detach())
    idx = sae.encode_sparse(x)[1]
    assert all(len(set(row.tolist())) == idx.shape[1] for row in idx)
    assert sae(x[:0]).x_hat.shape == (0, M * D)
    rows = x[:4].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sae(x).x_hat, (rows,))


def test_one_with_thresholds_is_not_trained() -> None:
    with pytest.raises(InputError, match="activation is 'relu': a cross-layer transcoder is trained with"):
        saefast.train({"x": data(100)[0], "target": data(100)[1]}, config(activation="relu"), settings())


@pytest.mark.parametrize("per_latent", [False, True])
def test_thresholds_for_one_that_was_trained(per_latent: bool, tmp_path: Path) -> None:
    sae, x = SAE(config(), seed=1), data(2000)[0]
    found = saefast.as_jumprelu(sae, x, x, per_latent=per_latent)
    assert found.after.l0 == pytest.approx(M * K, rel=0.01)
    on = (found.sae.encode(x) > 0).reshape(len(x), M, F).sum(2).double().mean(0)
    # Each layer by itself, for its pre-activations may be of another size.
    assert on.tolist() == pytest.approx([K] * M, rel=0.01)
    limits = found.sae.log_threshold.reshape(M, F)
    assert bool((limits == limits[:, :1]).all()) is not per_latent
