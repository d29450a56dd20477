"""What is said of a crosscoder's latents: against planted layers, and least squares over all tokens at once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import saefast
from saefast.analysis.crosscoder import CrosscoderMetrics, part_norms, relative_norms
from saefast.analysis.evaluation import evaluate_run
from saefast.cli.eval import table
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.training.progress import read_metrics

W, L, K = 10, 6, 2


def crosscoder(widths: tuple[int, ...] = (W, W)) -> SAE:
    sae = SAE(SAEConfig(sum(widths), L, K, crosscode_widths=widths, dtype="float64"), seed=1)
    sae.part_scale.copy_(torch.tensor([2.0, 0.5, 1.0][: len(widths)]))
    with torch.no_grad():
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(0))
    return sae.requires_grad_(False)


def levels(sae: SAE) -> Tensor:
    return torch.cat(
        [torch.full((w,), float(s)) for w, s in zip(sae.architecture.parts(), sae.part_scale, strict=True)]
    )


def seen(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_hat, acts, idx = sae(x)
    return x * levels(sae), x_hat * levels(sae), acts, idx


def accumulated(sae: SAE, x: Tensor) -> CrosscoderMetrics:
    metrics = CrosscoderMetrics(sae)
    for rows in x.split(7):
        metrics.update(*seen(sae, rows))
    return metrics


def test_relative_norms_are_of_scaled_parts() -> None:
    sae = crosscoder()
    sae.W_dec[0] = 0
    sae.W_dec[0, 0] = 3.0  # the first alone
    sae.W_dec[1, :W], sae.W_dec[1, W:] = 0, 1.0  # the second alone
    sae.W_dec[2] = 0
    sae.W_dec[2, 0], sae.W_dec[2, W] = 0.5, 2.0  # 1 and 1, once scaled
    sae.W_dec[3] = 0
    sae.W_dec[3, 0], sae.W_dec[3, W] = 0.5, 1.0  # 1 and 0.5
    assert relative_norms(sae)[:4].tolist() == [0, 1, 0.5, 0.25]
    assert part_norms(sae)[3].tolist() == [1, 0.5]


def test_latent_scaling_is_least_squares_over_all_tokens() -> None:
    sae = crosscoder()
    x = torch.randn(100, 2 * W, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.3
    found = accumulated(sae, x)
    scaling = found.scaling()
    assert scaling is not None
    target, x_hat, _, _ = seen(sae, x)
    W_dec = sae.W_dec * levels(sae)
    f = sae.encode(x) / part_norms(sae).sum(1)
    for j in range(L):
        strong = int(part_norms(sae)[j].argmax())
        d = W_dec[j, W * strong : W * strong + W]
        A = (f[:, j, None] * d).flatten()[:, None]
        for m in range(2):
            part = slice(W * m, W * m + W)
            left_out = target[:, part] - (x_hat[:, part] - f[:, j, None] * W_dec[j, part])
            for y, beta in ((left_out, scaling.error), (x_hat[:, part], scaling.reconstruction)):
                expected = torch.linalg.lstsq(A, y.flatten()[:, None]).solution
                torch.testing.assert_close(beta[j, m], expected[0, 0])
    residual, spread = target - x_hat, target - target.mean(0)
    parts = [slice(0, W), slice(W, 2 * W)]
    assert found.fvu() == pytest.approx(
        [float(residual[:, p].square().sum() / spread[:, p].square().sum()) for p in parts]
    )


def test_a_planted_scale_is_found() -> None:
    """The second model holds latent 0 at 0.4 of its strength, but the crosscoder's decoder says not at all."""
    sae = crosscoder()
    sae.part_scale.fill_(1)
    sae.b_dec.zero_()
    sae.W_dec.zero_()
    sae.W_dec[torch.arange(L), torch.arange(L)] = 1.0
    sae.W_enc.copy_(sae.W_dec)
    code = torch.zeros(400, L, dtype=torch.float64)
    code[torch.arange(400), torch.arange(400) % L] = torch.rand(400, dtype=torch.float64) + 0.5
    x = code @ sae.W_dec
    x[:, W] += 0.4 * code[:, 0]
    scaling = accumulated(sae, x).scaling()
    assert scaling is not None
    # Of one and the same direction in both: the first column of each part.
    assert float(scaling.nu_error[0, 1]) == pytest.approx(0.4, abs=1e-3)
    assert scaling.nu_error[1:, 1].abs().max() < 1e-3
    assert scaling.nu_reconstruction[:, 1].abs().max() < 1e-3


def test_parts_of_several_widths_have_no_direction_in_common() -> None:
    sae = crosscoder((4, 6))
    metrics = accumulated(sae, torch.randn(30, 10, dtype=torch.float64))
    assert metrics.scaling() is None
    assert set(metrics.latents()) == {"part_norms"}
    assert "only_first_nu_error" not in metrics.compute()["latents"]


def test_three_parts_have_a_span() -> None:
    sae = crosscoder((W, W, W))
    sae.W_dec.zero_()
    sae.W_dec[:, 0] = 1.0
    sae.W_dec[:, 2 * W] = 2.0  # of the same norm, scaled
    found = accumulated(sae, torch.randn(30, 3 * W, dtype=torch.float64)).compute()
    assert found["span"] == pytest.approx(2)
    assert [part["norm_share"] for part in found["parts"]] == pytest.approx([0.5, 0, 0.5])
    assert "latents" not in found
    with pytest.raises(InputError, match="sae has 3 parts: relative norms compare two"):
        relative_norms(sae)


def test_an_sae_of_one_place_is_refused() -> None:
    sae = SAE(SAEConfig(8, 16, 2))
    for ask in (part_norms, relative_norms, CrosscoderMetrics):
        with pytest.raises(InputError, match="sae is no crosscoder: its crosscode_widths is None"):
            ask(sae)


def test_a_run_is_evaluated_by_layer(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    code = torch.rand(1500, 20, generator=generator) ** 8
    x = code @ torch.randn(20, 2 * W, generator=generator) * torch.tensor([1.0, 50.0]).repeat_interleave(W)
    torch.save(x, tmp_path / "x.pt")
    config = SAEConfig(2 * W, 40, 4, activation="batchtopk", crosscode_widths=(W, W))
    train = saefast.TrainConfig(n_tokens=6000, batch_size=64, save_every=0)
    saefast.train(tmp_path / "x.pt", config, train, tmp_path / "run")
    result = evaluate_run(tmp_path / "run")
    written: dict[str, Any] = json.loads((tmp_path / "run" / "eval.json").read_text(encoding="utf-8"))
    parts = [part["fvu"] for part in written["by_part"]["parts"]]
    assert max(parts) < 0.5
    # Scaled alike, the whole lies between its parts, and is what the run measured at its end.
    assert min(parts) < result.metrics["fvu"] < max(parts)
    assert result.metrics["fvu"] == pytest.approx(read_metrics(tmp_path / "run")[-1]["heldout/fvu"], rel=1e-3)
    counts = written["by_part"]["latents"]
    assert sum(counts[name] for name in ("only_first", "only_second", "shared", "between")) == int(
        (result.accumulated.sparsity.counts > 0).sum()
    )
    assert "several places are reconstructed at once" in written["lm_left_out"]
    assert "layers or models, scaled alike" in table(result)
    tensors = saefast.data.shardfile.read_header(tmp_path / "run" / "latents.safetensors")
    assert tensors["part_norms"].shape == tensors["nu_error"].shape == (40, 2)
