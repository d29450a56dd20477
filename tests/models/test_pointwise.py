"""Pointwise architectures: one that uses all there is, in both engines, against its maths in dense float64 torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from classic import CLASSIC_TRAIN
from torch import Tensor

import saefast
from saefast.engines.autograd import AutogradEngine
from saefast.engines.fused import FusedEngine
from saefast.errors import InputError
from saefast.models import registry
from saefast.models.architecture import At
from saefast.models.config import SAEConfig
from saefast.models.pointwise import Own, Pointwise, warmed_up
from saefast.models.sae import SAE
from saefast.ops.code import Code, Number

D, L, K, B, COEF = 10, 36, 4, 48, 0.07


class Everything(Pointwise):
    """acts = gain · ReLU(pre - offset) above offset; pays for acts, norms and pre; has a second reconstruction.

    Also a matrix past the code, and state: the L0 of the step before, which the coefficient depends on.
    """

    name = "everything"

    def parameters(self) -> dict[str, Tensor]:
        return {"offset": torch.full((L,), 0.1), "gain": torch.linspace(0.5, 1.5, L), "past": torch.zeros(D, D)}

    def state(self, train: Any) -> dict[str, Tensor]:
        return {"l0_before": torch.zeros((), dtype=torch.float64)}

    def wants_norms(self, train: Any) -> bool:
        return True

    def limit(self, own: Own, train: Any) -> Tensor | float:
        # Below the offset by a half: the penalty is paid there too.
        return own["offset"] - (0.5 if train is not None else 0.0)

    def activate(self, pre: Tensor, own: Own) -> Tensor:
        return own["gain"].abs() * (pre - own["offset"]).relu()

    def penalty(self, pre: Tensor, acts: Tensor, own: Own, norms: Tensor | None, train: Any) -> Tensor:
        assert norms is not None
        return acts.square() * norms + (pre - own["offset"] + 0.5).relu() * own["gain"]

    def frozen(self, pre: Tensor, own: Own) -> Tensor:
        return (pre - own["offset"] + own["b_enc"] * 0.3).relu()

    def coefficient(self, at: At, kept: dict[str, Tensor], l0: Number, train: Any) -> Number:
        return COEF * warmed_up(at, train) * (1 + kept["l0_before"] / L)

    def observed(self, kept: dict[str, Tensor], code: Code, scale: Tensor | None, at: At, train: Any) -> Any:
        return kept | {"l0_before": (code.acts > 0).sum().double() / code.rows}

    def direct(self, x: Tensor, own: Any) -> Tensor:
        return x @ own["past"].T

    def rescaled(self, tensors: dict[str, Tensor], scale: float, target_scale: float) -> dict[str, Tensor]:
        found = super().rescaled(tensors, scale, target_scale)
        return found | {name: tensors[name] for name in ("gain", "past")}


def dense_loss(p: dict[str, Tensor], x: Tensor, l0_before: float, share: float) -> tuple[Tensor, float, Tensor]:
    """The same by hand, on (B, L) tensors. -> The loss, L0 and the penalty with its coefficient."""
    pre = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    above = pre - p["offset"]
    acts = torch.where(above > 0, p["gain"] * above, 0.0)
    variance = (x - x.mean(0)).pow(2).sum()
    error = x - acts @ p["W_dec"] - p["b_dec"] - x @ p["past"].T
    second = torch.clamp(above + 0.3 * p["b_enc"], min=0) * (above > -0.5)
    again = x - x @ p["past"].T.detach() - second @ p["W_dec"].detach() - p["b_dec"].detach()
    paid = acts**2 * p["W_dec"].pow(2).sum(1).sqrt() + torch.clamp(above + 0.5, min=0) * p["gain"]
    coefficient = COEF * share * (1 + l0_before / L)
    penalty = coefficient * paid.sum() / len(x)
    return (error.pow(2).sum() + again.pow(2).sum()) / variance + penalty, float((acts > 0).sum()) / len(x), penalty


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> SAEConfig:
    monkeypatch.setitem(registry.ACTIVATIONS, "everything", Everything)
    monkeypatch.setitem(SAEConfig.__annotations__, "activation", str)
    return SAEConfig(D, L, K, activation="everything", dtype="float64", init="tied", unit_norm_decoder=False)


def rows(n: int = 50 * B) -> Tensor:
    code = torch.rand(n, 30) * (torch.rand(n, 30) < 0.1)
    return (code @ torch.randn(30, D) + 0.01 * torch.randn(n, D)).double()


TRAIN: dict[str, Any] = CLASSIC_TRAIN | dict(
    lr=1e-3, auxk_coef=0.0, settle_every=1, decoder_norm="never", project_decoder_grad=False, loss="fvu",
    lr_warmup_steps=0, lr_decay_share=0.0, beta1=0.9, sparsity_warmup_share=0.2,
)  # fmt: skip


@pytest.mark.parametrize("kind", [FusedEngine, AutogradEngine])
def test_an_engine_takes_the_steps_of_its_dense_statement(everything: SAEConfig, kind: Any) -> None:
    data, steps = rows().split(B), 30
    config = saefast.TrainConfig(**TRAIN)
    engine = kind(SAE(everything, seed=3), config, steps)
    engine.initialise(data[0])
    p = {name: value.detach().clone().requires_grad_() for name, value in engine.sae.named_parameters()}
    adam = torch.optim.Adam(p.values(), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    l0 = 0.0
    for step, x in enumerate(data[:steps]):
        stats = engine.step(x)
        loss, l0, penalty = dense_loss(p, x, l0, min((step + 1) / (0.2 * steps), 1.0))
        adam.zero_grad()
        loss.backward()
        assert float(stats.loss) == pytest.approx(float(loss.detach()), rel=1e-9)
        assert float(stats.l0) == pytest.approx(l0, rel=1e-6)
        assert float(stats.sparsity_loss) == pytest.approx(float(penalty.detach()), rel=1e-9)
        assert float(stats.grad_norm) == pytest.approx(
            float(torch.stack([v.grad.norm() for v in p.values() if v.grad is not None]).norm()), rel=1e-8
        )
        adam.step()
    for name, value in p.items():
        assert torch.allclose(getattr(engine.sae, name), value, rtol=1e-7, atol=1e-9), name


def test_what_is_served_is_its_activation(everything: SAEConfig) -> None:
    sae, x = SAE(everything, seed=1), rows(20)
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    dense = sae.gain * torch.clamp(pre - sae.offset, min=0)
    assert torch.allclose(sae.encode(x), dense)
    assert torch.allclose(sae(x).x_hat, dense @ sae.W_dec + sae.b_dec + x @ sae.past.T)
    # Differentiable in all that it depends on.
    sae(x).x_hat.square().sum().backward()
    ours = {name: value.grad.clone() for name, value in sae.named_parameters()}
    sae.zero_grad()
    (dense @ sae.W_dec + sae.b_dec + x @ sae.past.T).square().sum().backward()
    for name, value in sae.named_parameters():
        assert torch.allclose(ours[name], value.grad), name


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_a_killed_run_resumes_bit_for_bit(everything: SAEConfig, engine: Any, tmp_path: Path) -> None:
    import dataclasses

    data, config = rows(40 * B).float(), dataclasses.replace(everything, dtype="float32")
    train = saefast.TrainConfig(**TRAIN | dict(n_tokens=len(data), batch_size=B, engine=engine, save_every=4))
    train = dataclasses.replace(train, settle_every=4, resample_every=5, dead_after=3 * B)

    class Stop(Exception):
        pass

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 10:
            raise Stop

    whole = saefast.train(data, config, train, tmp_path / "whole")
    with pytest.raises(Stop):
        saefast.train(data, config, train, tmp_path / "cut", on_log=stop)
    resumed = saefast.train(data, config, train, tmp_path / "cut", resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    loaded = saefast.load(tmp_path / "whole")
    assert torch.equal(loaded(data[:9]).x_hat, whole(data[:9]).x_hat)


@pytest.mark.parametrize("name", ["multi_topk_coef", "auxk_coef"])
def test_what_needs_a_ranking_is_refused(everything: SAEConfig, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is 0.5.*'everything'"):
        FusedEngine(SAE(everything, seed=0), saefast.TrainConfig(**TRAIN | {name: 0.5}), 10)
