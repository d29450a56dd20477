"""The registry alone knows architectures: one of this file is trained, saved, planned and asked for by a flag."""

from dataclasses import dataclass
from inspect import isfunction
from pathlib import Path
from typing import Any

import pytest
import torch
from classic import CLASSIC_TRAIN
from torch import Tensor

import saefast
from saefast.engines.config import PRESETS
from saefast.engines.recipe import choose
from saefast.errors import InputError
from saefast.models import registry
from saefast.models.architecture import Architecture, At, Layer, NoFields, Term, Terms
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.ops.code import Code, padded
from saefast.ops.encoder import Encoder
from saefast.training.plan import Sizes, memory_of

D, L, K, B = 12, 40, 4, 64


class Pairs(Architecture):
    """Two dictionaries of half the size: the best 2 of the whole, each reconstruction weighted; keeps a count."""

    name = "pairs"

    def buffers(self) -> dict[str, Tensor]:
        return {"steps_seen": torch.zeros((), dtype=torch.float32)}

    def width(self, train: Any) -> int:
        return 2

    def code(self, encoder: Encoder, train: Any, at: At) -> Code:
        return encoder.topk(2)

    def serve(self, encoder: Encoder, buffers: dict[str, Tensor]) -> Code:
        return encoder.topk(2)

    def terms(self, train: Any, at: At) -> Terms:
        return Terms((Term(L // 2, 0.5), Term(L, 2.0)), by_latent=True, main=1)

    def observed(self, kept: dict[str, Tensor], code: Code, scale: Tensor | None, at: At, train: Any) -> Any:
        return kept | {"steps_seen": kept["steps_seen"] + 1}

    def rescaled(self, tensors: dict[str, Tensor], scale: float, target_scale: float) -> dict[str, Tensor]:
        return super().rescaled(tensors, scale, target_scale) | {"steps_seen": tensors["steps_seen"]}


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> SAEConfig:
    """A config of the architecture above, which the registry knows for as long as a test runs."""
    monkeypatch.setitem(registry.ACTIVATIONS, "pairs", Pairs)
    # The names that `activation` may have are laid down where SAEConfig is made.
    monkeypatch.setitem(SAEConfig.__annotations__, "activation", str)
    return SAEConfig(D, L, K, activation="pairs")


def rows(n: int = 2000) -> Tensor:
    code = torch.rand(n, 30) * (torch.rand(n, 30) < 0.1)
    return code @ torch.randn(30, D) + 0.01 * torch.randn(n, D)


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_an_architecture_trains_and_is_saved_with_what_it_keeps(pairs: SAEConfig, engine: Any, tmp_path: Path) -> None:
    data = rows()
    config = saefast.TrainConfig(n_tokens=len(data) * 4, batch_size=B, lr=3e-3, engine=engine, log_every=1)
    lines: list[dict[str, Any]] = []
    sae = saefast.train(data, pairs, config, tmp_path / "run", on_log=lines.append)
    assert lines[-1]["fvu"] < 0.9 * lines[0]["fvu"]
    assert all(0 < line["metrics/l0"] <= 2 for line in lines)
    steps = len(data) * 4 // B
    assert float(sae.steps_seen) == steps
    loaded = saefast.load(tmp_path / "run")
    assert loaded.architecture.name == "pairs"
    assert float(loaded.steps_seen) == steps
    assert torch.equal(loaded(data[:9]).x_hat, sae(data[:9]).x_hat)


def test_both_engines_minimise_its_terms(pairs: SAEConfig) -> None:
    """50 steps in float64, every row in every update."""
    from saefast.engines.autograd import AutogradEngine
    from saefast.engines.fused import FusedEngine

    data = rows(50 * B).double().split(B)
    config = saefast.TrainConfig(lr=1e-3, dead_after=3 * B, settle_every=1, **CLASSIC_TRAIN)
    stats = []
    for kind in (FusedEngine, AutogradEngine):
        engine = kind(SAE(SAEConfig(D, L, K, activation="pairs", dtype="float64", init="tied"), seed=3), config, 60)
        engine.initialise(data[0])
        stats.append([engine.step(x) for x in data])
    for ours, dense in zip(*stats, strict=True):
        assert float(ours.loss) == pytest.approx(float(dense.loss), rel=1e-9)
        assert float(ours.auxk_loss) == pytest.approx(float(dense.auxk_loss), rel=1e-9)
    assert any(float(s.auxk_loss) > 0 for s in stats[0])


def test_a_killed_run_resumes_with_what_it_keeps(pairs: SAEConfig, tmp_path: Path) -> None:
    data = rows()
    config = saefast.TrainConfig(n_tokens=len(data), batch_size=B, lr=3e-3, save_every=4)

    class Stop(Exception):
        pass

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 10:
            raise Stop

    whole = saefast.train(data, pairs, config, tmp_path / "whole")
    with pytest.raises(Stop):
        saefast.train(data, pairs, config, tmp_path / "cut", on_log=stop)
    resumed = saefast.train(data, pairs, config, tmp_path / "cut", resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_plan_asks_it(pairs: SAEConfig) -> None:
    train = choose(pairs, saefast.TrainConfig(batch_size=B), n_rows=1000)
    plain = Sizes.of(SAEConfig(D, L, 2), train)
    ours = Sizes.of(pairs, train)
    assert (ours.k, ours.terms) == (2, 2)
    assert memory_of(ours, "cpu")["batch"] - memory_of(plain, "cpu")["batch"] == B * D * 4


def test_engines_that_cannot_train_it_say_so(pairs: SAEConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pairs, "engines", ("autograd",))
    with pytest.raises(InputError, match="engine is 'fused', which does not train 'pairs': use 'autograd'"):
        saefast.train(rows(), pairs, saefast.TrainConfig(n_tokens=64, batch_size=64))


def test_fields_of_all_architectures_are_fields_of_the_configs() -> None:
    for which, config in (("Fields", SAEConfig), ("TrainFields", saefast.TrainConfig)):
        for kind in (*registry.ACTIVATIONS.values(), *registry.LAYERS):
            for name in getattr(kind, which).__dataclass_fields__:
                assert name in config.__dataclass_fields__
                assert f"\n        {name}: " in str(config.__doc__), f"{name} is not described"


def test_two_architectures_may_not_claim_one_field(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Claims(NoFields):
        """Attributes: none of its own."""

        multi_topk_coef: float = 1.0

    monkeypatch.setattr(Pairs, "TrainFields", Claims)
    monkeypatch.setitem(registry.ACTIVATIONS, "pairs", Pairs)
    with pytest.raises(AssertionError, match="multi_topk_coef"):
        registry.fields("TrainFields")


def test_recipes_know_what_an_architecture_adds(pairs: SAEConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pairs, "presets", {"sparsify": dict(auxk_coef=0.25)})
    sae, train = saefast.preset("sparsify", D, L, K, activation="pairs")
    assert sae.activation == "pairs"
    assert train.auxk_coef == 0.25 != PRESETS["sparsify"]["auxk_coef"]
    assert saefast.preset("sparsify", D, L, K, activation="pairs", auxk_coef=0.5)[1].auxk_coef == 0.5
    assert saefast.preset("sparsify", D, L, K)[1].auxk_coef == 0.0


def test_a_layer_answers_for_what_it_lies_over() -> None:
    """Every question of an architecture is handed down by a layer, so that none is answered by the base class."""
    asked = {name for name, value in vars(Architecture).items() if isfunction(value) and not name.startswith("_")}
    assert asked <= set(vars(Layer))


def test_padding_keeps_ids_distinct() -> None:
    for L_, widths in ((50, (0, 7, 3, 1)), (5, (5, 0, 2)), (9, (0, 0)), (300, (2, 0, 150))):
        acts = [torch.rand(n) + 0.1 for n in widths]
        idx = [torch.randperm(L_)[:n].int() for n in widths]
        ends = torch.tensor([0, *widths]).cumsum(0).int()
        spare = 3  # places that belong to no row
        code = Code(
            torch.cat([*acts, torch.zeros(spare)]), torch.cat([*idx, torch.zeros(spare, dtype=torch.int32)]), ends
        )
        wide = padded(code, L_)
        assert wide.idx.shape == (len(widths), max(widths))
        for row, n in enumerate(widths):
            assert torch.equal(wide.acts[row, :n], acts[row])
            assert torch.equal(wide.idx[row, :n], idx[row])
            assert (wide.acts[row, n:] == 0).all()
            assert len(set(wide.idx[row].tolist())) == max(widths)
            assert ((wide.idx[row] >= 0) & (wide.idx[row] < L_)).all()
