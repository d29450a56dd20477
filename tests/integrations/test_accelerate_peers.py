"""accelerate() on the peers' own objects: values, gradients, training steps, copies and files are what they were.

`make peers` runs this where they are installed. In float64 the choice of latents is theirs, so that everything is
compared with the unaccelerated object's dense autograd to rounding.
"""

import copy
import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saefast.errors import InputError
from saefast.integrations.accelerate import PACKAGES, accelerate, restore

pytestmark = pytest.mark.peers
B, D, L, K = 24, 12, 64, 4
WIDTHS = [8, 24, L]
F64: dict[str, Any] = dict(dtype=torch.float64)


def rows(seed: int = 0, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=generator, **(F64 | options)) + 0.3


def stirred(module: nn.Module, seed: int = 1, low: int = 20) -> nn.Module:
    """Weights as they might be in training: no bias 0, no row of norm 1, the last latents too low to be chosen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "threshold" not in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if name in ("b_enc", "encoder.bias"):
                parameter[len(parameter) - low :] -= 3.0
    return module


def sae_lens(name: str, **config: Any) -> nn.Module:
    import sae_lens
    import sae_lens.saes.transcoder as transcoders

    home = sae_lens if hasattr(sae_lens, name) else transcoders
    settings = dict(d_in=D, d_sae=L, dtype="float64") | config
    return stirred(getattr(home, name)(getattr(home, f"{name}Config")(**settings)))


def sparse_coder(**config: Any) -> nn.Module:
    from sparsify import SparseCoder, SparseCoderConfig

    # Of a group without a positive latent any one may be the largest.
    low = 0 if config.get("activation") == "groupmax" else 20
    return stirred(SparseCoder(D, SparseCoderConfig(num_latents=L, k=K, **config), **F64), low=low)


def trainer(name: str, **settings: Any) -> Any:
    """One of dictionary_learning's, in float64, with some dead latents from the second step on."""
    import dictionary_learning.trainers.batch_top_k as batch_top_k
    import dictionary_learning.trainers.jumprelu as jumprelu
    import dictionary_learning.trainers.matryoshka_batch_top_k as matryoshka
    import dictionary_learning.trainers.top_k as top_k

    home = next(m for m in (top_k, batch_top_k, matryoshka, jumprelu) if hasattr(m, name) and name in dir(m))
    if name != "JumpReluTrainer":
        settings = dict(k=K, threshold_start_step=0) | settings
    found = getattr(home, name)(
        steps=3000, activation_dim=D, dict_size=L, layer=0, lm_name="none", device="cpu", warmup_steps=2, seed=0,
        **settings,
    )  # fmt: skip
    stirred(found.ae.double())
    found.dead_feature_threshold = B
    return found


def thresholds(module: nn.Module, height: float = 0.9) -> nn.Module:
    """Thresholds that few pre-activations reach."""
    with torch.no_grad():
        spread = 0.1 * torch.rand(L, generator=torch.Generator().manual_seed(2), **F64)
        module.threshold += height + (spread if module.threshold.dim() else 0.0)
    return module


DEAD = torch.arange(L) >= L - 20
SAE_LENS_TRAINING = {
    "topk": ("TopKTrainingSAE", dict(k=K)),
    "topk, plain ranking": ("TopKTrainingSAE", dict(k=K, rescale_acts_by_decoder_norm=False)),
    "topk, sparse": ("TopKTrainingSAE", dict(k=K, use_sparse_activations=True, rescale_acts_by_decoder_norm=False)),
    "topk, clipped": ("TopKTrainingSAE", dict(k=L - 10)),
    "topk, layer norm": ("TopKTrainingSAE", dict(k=K, normalize_activations="layer_norm")),
    "batchtopk": ("BatchTopKTrainingSAE", dict(k=K)),
    "batchtopk, k no integer": ("BatchTopKTrainingSAE", dict(k=K + 0.4)),
    "matryoshka": ("MatryoshkaBatchTopKTrainingSAE", dict(k=K, matryoshka_widths=WIDTHS)),
    "matryoshka, an aux each": (
        "MatryoshkaBatchTopKTrainingSAE",
        dict(k=K, matryoshka_widths=WIDTHS, use_matryoshka_aux_loss=True),
    ),
}


@pytest.fixture
def sparse_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds are taken sparsely at whatever share of latents is on: few latents are always a large share."""
    monkeypatch.setattr("saefast.integrations.accelerate_ops.SPARSE", 1.0)


def sae_lens_step(sae: Any, x: Tensor, dead: Tensor | None) -> tuple[Any, dict[str, Tensor]]:
    from sae_lens.saes.sae import TrainStepInput

    coefficients = dict.fromkeys(sae.get_coefficients(), 0.7)
    sae.zero_grad()
    output = sae.training_forward_pass(TrainStepInput(x, coefficients, dead, 0, False))
    output.loss.backward()
    return output, gradients(sae)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros(()) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def both(make: Callable[[], Any], **options: Any) -> tuple[Any, Any]:
    """An accelerated object, and one made like it. A copy would not do: closures of SAELens' know the first."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(make())
    return accelerate(found[0], **options), found[1]


@pytest.mark.parametrize("dead", [None, DEAD], ids=["all alive", "some dead"])
@pytest.mark.parametrize("case", SAE_LENS_TRAINING)
def test_a_step_of_a_sae_lens_training_sae(case: str, dead: Tensor | None) -> None:
    name, config = SAE_LENS_TRAINING[case]
    if "layer norm" in case and dead is not None:
        pytest.skip("SAELens refuses it, see test_what_sae_lens_refuses_is_refused")
    ours, theirs = both(lambda: sae_lens(name, **config))
    for seed in range(2):
        (mine, my_grads), (other, their_grads) = (sae_lens_step(sae, rows(seed), dead) for sae in (ours, theirs))
        assert_same(mine.loss, other.loss)
        assert_same(dict(mine.losses), dict(other.losses))
        assert_same(mine.sae_out, other.sae_out)
        assert_same(mine.hidden_pre, other.hidden_pre)
        assert_same(mine.feature_acts.to_dense(), other.feature_acts.to_dense())
        assert_same(my_grads, their_grads)
    assert_same(ours.state_dict(), theirs.state_dict())


def test_what_sae_lens_refuses_is_refused() -> None:
    ours = accelerate(sae_lens("TopKTrainingSAE", k=K, normalize_activations="layer_norm"))
    with pytest.raises(InputError, match="layer_norm"):
        sae_lens_step(ours, rows(), DEAD)


@pytest.mark.usefixtures("sparse_always")
@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize("mode", ["step", "tanh", "quadratic"])
def test_a_step_of_a_sae_lens_jumprelu(mode: str, to_input: bool) -> None:
    config = dict(jumprelu_sparsity_loss_mode=mode, jumprelu_ste_to_input=to_input, jumprelu_bandwidth=0.5)
    make = lambda: thresholds(  # noqa: E731
        sae_lens("JumpReLUTrainingSAE", target_l0=3.0, pre_act_loss_coefficient=0.1, **config)
    )
    ours, theirs = both(make)
    (mine, my_grads), (other, their_grads) = (sae_lens_step(sae, rows(), DEAD) for sae in (ours, theirs))
    assert mine.feature_acts.is_sparse
    assert_same(dict(mine.losses), dict(other.losses))
    assert_same(mine.feature_acts.to_dense(), other.feature_acts)
    assert_same(mine.hidden_pre, other.hidden_pre)
    assert my_grads["threshold"].count_nonzero() > 0
    # Thresholds, and so their gradients, are in float32 whatever the SAE is in.
    thresholds_of = [grads.pop("threshold") for grads in (my_grads, their_grads)]
    torch.testing.assert_close(*thresholds_of, rtol=1e-6, atol=1e-6)
    assert_same(my_grads, their_grads)


@pytest.mark.usefixtures("sparse_always")
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_a_step_of_a_standard_sae_of_sae_lens(power: float) -> None:
    ours, theirs = both(lambda: sae_lens("StandardTrainingSAE", lp_norm=power))
    (mine, my_grads), (other, their_grads) = (sae_lens_step(sae, rows(), None) for sae in (ours, theirs))
    assert mine.feature_acts.is_sparse
    assert_same(dict(mine.losses), dict(other.losses))
    assert_same(my_grads, their_grads)


def test_what_is_not_sparse_stays_dense() -> None:
    ours, theirs = both(lambda: sae_lens("StandardTrainingSAE"))
    (mine, my_grads), (_, their_grads) = (sae_lens_step(sae, rows(), None) for sae in (ours, theirs))
    assert not mine.feature_acts.is_sparse
    assert_same(my_grads, their_grads)


SERVED: dict[str, Callable[[], Any]] = {
    "topk": lambda: sae_lens("TopKSAE", k=K),
    "topk, rescaled": lambda: sae_lens("TopKSAE", k=K, rescale_acts_by_decoder_norm=True),
    "topk, normed": lambda: sae_lens("TopKSAE", k=K, normalize_activations="layer_norm"),
    "jumprelu": lambda: thresholds(sae_lens("JumpReLUSAE")),
    "standard": lambda: sae_lens("StandardSAE"),
    "transcoder": lambda: sae_lens("Transcoder", d_out=D + 3, apply_b_dec_to_input=False),
    "skip transcoder": lambda: sae_lens("SkipTranscoder", d_out=D + 3, apply_b_dec_to_input=False),
    "jumprelu transcoder": lambda: thresholds(sae_lens("JumpReLUTranscoder", d_out=D + 3, apply_b_dec_to_input=False)),
    "jumprelu skip transcoder": lambda: thresholds(
        sae_lens("JumpReLUSkipTranscoder", d_out=D + 3, apply_b_dec_to_input=False)
    ),
    "training topk": lambda: sae_lens("TopKTrainingSAE", k=K),
    "training batchtopk": lambda: sae_lens("BatchTopKTrainingSAE", k=K),
    "training jumprelu": lambda: thresholds(sae_lens("JumpReLUTrainingSAE")),
    "AutoEncoderTopK": lambda: trainer("TopKTrainer").ae,
    "BatchTopKSAE": lambda: thresholds(trainer("BatchTopKTrainer").ae, 1.9),
    "BatchTopKSAE without a threshold yet": lambda: trainer("BatchTopKTrainer").ae,
    "MatryoshkaBatchTopKSAE": lambda: thresholds(
        trainer("MatryoshkaBatchTopKTrainer", group_fractions=[0.25, 0.75]).ae, 1.9
    ),
    "JumpReluAutoEncoder": lambda: thresholds(trainer("JumpReluTrainer").ae),
}


@pytest.mark.usefixtures("sparse_always")
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("shape", [(B,), (2, B // 2)], ids=["rows", "sequences"])
@pytest.mark.parametrize("case", SERVED)
def test_what_is_served(case: str, shape: tuple[int, ...], grad: bool) -> None:
    ours, theirs = both(SERVED[case])
    x = rows().reshape(*shape, D)
    with torch.set_grad_enabled(grad):
        f, expected = ours.encode(x), theirs.encode(x)
        assert_same(f, expected)
        assert_same(ours.decode(f), theirs.decode(expected))
        if "normed" not in case:  # what undoes the normalisation works once
            assert_same(ours.decode(2 * f), theirs.decode(2 * expected))
        mine, other = ours(x), theirs(x)
        assert_same(mine, other)
        if grad:
            (mine.sin().sum() + f.cos().sum()).backward()
            (other.sin().sum() + expected.cos().sum()).backward()
            assert_same(gradients(ours), gradients(theirs))


def test_a_written_code_is_decoded_as_it_is() -> None:
    """Decoding looks at what it is given: a latent that was switched off, in whatever way, is off."""
    ours, theirs = both(SERVED["topk"])
    for inference in (False, True):
        with torch.inference_mode(inference), torch.no_grad():
            for write in (lambda f: f[:, :30].zero_(), lambda f: f.data[:, 7].fill_(2.0), lambda f: f.mul_(0.5)):
                f, expected = ours.encode(rows()), theirs.encode(rows())
                write(f), write(expected)
                assert_same(ours.decode(f), theirs.decode(expected))


@pytest.mark.parametrize("hook", ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"])
@pytest.mark.parametrize("case", ["topk", "topk, rescaled", "training topk"])
def test_hooks_of_sae_lens_see_and_change_what_they_did(case: str, hook: str) -> None:
    ours, theirs = both(SERVED[case])
    seen: dict[str, list[Tensor]] = {"ours": [], "theirs": []}
    found = {}
    for name, sae in (("ours", ours), ("theirs", theirs)):

        def change(value: Tensor, hook: Any, seen: list[Tensor] = seen[name]) -> Tensor:
            seen.append(value.clone())
            return value * 1.5

        with sae.hooks(fwd_hooks=[(hook, change)]):
            found[name] = sae(rows())
    assert len(seen["ours"]) == len(seen["theirs"]) == 1
    assert_same(seen["ours"], seen["theirs"])
    assert_same(found["ours"], found["theirs"])


def test_the_error_term_of_sae_lens() -> None:
    ours, theirs = both(SERVED["topk"])
    for sae in (ours, theirs):
        sae._use_error_term = True
    assert_same(ours(rows()), theirs(rows()))
    assert_same(ours(rows()), rows())


SPARSE_CODERS: dict[str, dict[str, Any]] = {
    "topk": {},
    "groupmax": dict(activation="groupmax"),
    "multi_topk": dict(multi_topk=True),
    "groupmax, multi_topk": dict(activation="groupmax", multi_topk=True),
    "transcoder": dict(transcode=True),
    "skip transcoder": dict(transcode=True, skip_connection=True),
}


def coder_step(coder: Any, dead: Tensor | None, y: Tensor | None = None) -> tuple[Any, dict[str, Tensor]]:
    coder.zero_grad()
    out = coder(rows(), y, dead_mask=dead)
    (out.fvu + out.auxk_loss / 3 + out.multi_topk_fvu / 8).backward()
    return out, gradients(coder)


@pytest.mark.parametrize("dead", [None, DEAD], ids=["all alive", "some dead"])
@pytest.mark.parametrize("case", SPARSE_CODERS)
def test_a_step_of_a_sparse_coder(case: str, dead: Tensor | None) -> None:
    """With sparsify's gradients asked for, every gradient is sparsify's; values are in any case."""
    y = rows(5) if "transcoder" in case else None
    for reproduce_bugs in (True, False):
        ours, theirs = both(lambda: sparse_coder(**SPARSE_CODERS[case]), reproduce_bugs=reproduce_bugs)
        (mine, my_grads), (other, their_grads) = (coder_step(coder, dead, y) for coder in (ours, theirs))
        for name in ("sae_out", "fvu", "auxk_loss", "multi_topk_fvu"):
            assert_same(getattr(mine, name), getattr(other, name))
        assert_same(*(torch.sort(out.latent_acts).values for out in (mine, other)))
        if "groupmax" not in case or "multi" in case:
            assert_same(*(torch.sort(out.latent_indices).values for out in (mine, other)))
        if reproduce_bugs:
            assert_same(my_grads, their_grads)
            assert my_grads["W_dec"].count_nonzero() > 0


@pytest.mark.parametrize("case", ["topk", "multi_topk", "transcoder", "skip transcoder"])
def test_gradients_of_a_sparse_coder_are_those_of_its_loss(case: str) -> None:
    """Of AuxK and MultiTopK too, and not where ReLU clipped: against dense autograd of the same loss."""
    k = L - 10  # more than there are positive pre-activations
    ours = accelerate(sparse_coder(**SPARSE_CODERS[case]))
    if case == "topk":
        ours.cfg.k = k
    x, y, dead = rows(), rows(5), DEAD
    out = ours(x, y, dead_mask=dead)
    (out.fvu + out.auxk_loss / 3 + out.multi_topk_fvu / 8).backward()
    found = gradients(ours)
    ours.zero_grad()
    pre = (x if ours.cfg.transcode else x - ours.b_dec) @ ours.encoder.weight.T + ours.encoder.bias
    skip = 0 if ours.W_skip is None else x @ ours.W_skip.T

    def decoded(pre: Tensor, k: int) -> Tensor:
        acts, idx = pre.relu().topk(k)
        return torch.zeros_like(pre).scatter(1, idx, acts) @ ours.W_dec

    variance = (y - y.mean(0)).square().sum()
    e = y - decoded(pre, ours.cfg.k) - ours.b_dec - skip
    scale, k_aux = (min(int(dead.sum()) / (D // 2), 1.0), min(D // 2, int(dead.sum())))
    e_hat = decoded(torch.where(dead, pre, -1e9), k_aux)
    loss = e.square().sum() / variance + scale * (e_hat - e.detach()).square().sum() / variance / 3
    if ours.cfg.multi_topk:
        loss = loss + (y - decoded(pre, 4 * ours.cfg.k) - ours.b_dec).square().sum() / variance / 8
    loss.backward()
    assert_same(found, gradients(ours))


def test_what_a_sparse_coder_encodes() -> None:
    ours, theirs = both(lambda: sparse_coder())
    for x in (rows(), rows().view(2, B // 2, D)):
        mine, other = ours.encode(x), theirs.encode(x)
        assert isinstance(mine, type(other))
        acts, idx, pre = mine
        assert_same(pre, other.pre_acts)
        assert_same(mine[2], other[2])
        assert_same(mine.pre_acts, other.pre_acts)
        assert_same(torch.sort(acts).values, torch.sort(other.top_acts).values)
        assert_same(pre.gather(-1, idx), acts)
        assert idx.dtype == torch.int64
    assert_same(ours.decode(*ours.encode(rows())[:2]), theirs.decode(*theirs.encode(rows())[:2]))
    assert type(pickle.loads(pickle.dumps(ours.encode(rows())))) is type(other)


def test_pre_activations_cannot_be_read_after_the_step() -> None:
    ours = accelerate(sparse_coder())
    out = ours.encode(rows())
    with torch.no_grad():
        ours.encoder.weight += 1
    with pytest.raises(InputError, match="pre_acts is made when it is first read"):
        out.pre_acts  # noqa: B018


def test_the_parallel_gradient_of_a_sparse_coder() -> None:
    ours, theirs = both(lambda: sparse_coder())
    for coder in (ours, theirs):
        coder.W_dec.grad = rows(7, dtype=torch.float64).repeat(L // B + 1, 1)[:L]
        coder.remove_gradient_parallel_to_decoder_directions()
    assert_same(ours.W_dec.grad, theirs.W_dec.grad)


TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("TopKTrainer", {}),
    "topk, clipped": ("TopKTrainer", dict(k=L - 10)),
    "topk without AuxK": ("TopKTrainer", dict(auxk_alpha=0)),
    "batchtopk": ("BatchTopKTrainer", {}),
    "matryoshka": ("MatryoshkaBatchTopKTrainer", dict(group_fractions=[0.125, 0.25, 0.625])),
    "jumprelu": ("JumpReluTrainer", dict(bandwidth=0.5, sparsity_warmup_steps=None, target_l0=3.0)),
}


@pytest.mark.usefixtures("sparse_always")
@pytest.mark.parametrize("case", TRAINERS)
def test_steps_of_a_trainer_of_dictionary_learning(case: str) -> None:
    """Whole updates, with Adam: losses, what is counted, parameters and thresholds stay together; AuxK is on."""
    name, settings = TRAINERS[case]

    def make() -> Any:
        found = trainer(name, **settings)
        return thresholds(found.ae, 0.6) and found if case == "jumprelu" else found

    ours, theirs = both(make)
    close: Any = assert_same
    if case == "jumprelu":  # whose own step is in float32
        close = lambda found, expected: torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # noqa: E731
    if case != "topk without AuxK":  # which its own logging does not know
        logs = [one.loss(rows(), step=1, logging=True) for one in (copy.deepcopy(ours), copy.deepcopy(theirs))]
        for found, expected in zip(*logs, strict=True):
            close(found, expected)
    for step in range(4):
        x = rows(step)
        close(ours.update(step, x), theirs.update(step, x))
        assert ours.get_logging_parameters().keys() == theirs.get_logging_parameters().keys()
        if "clipped" not in case:
            # Which of several zeros was chosen differs, and so who counts as fired.
            assert torch.equal(ours.num_tokens_since_fired, theirs.num_tokens_since_fired)
            assert int(ours.dead_features) == int(theirs.dead_features)
        close(ours.ae.state_dict(), theirs.ae.state_dict())
    if case in ("topk", "batchtopk", "matryoshka"):
        assert ours.dead_features > 0
        assert_same(torch.as_tensor(ours.pre_norm_auxk_loss), torch.as_tensor(theirs.pre_norm_auxk_loss))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_in_fewer_bits(precision: torch.dtype) -> None:
    make = lambda: sparse_coder().to(precision)  # noqa: E731
    ours, theirs = both(make)
    mine, other = (coder(rows().to(precision)) for coder in (ours, theirs))
    assert mine.sae_out.dtype == other.sae_out.dtype
    torch.testing.assert_close(mine.sae_out.double(), other.sae_out.double(), rtol=3e-2, atol=3e-2)
    served = both(lambda: sae_lens("TopKSAE", k=K).to(dtype=precision))
    f, expected = (sae.encode(rows()) for sae in served)
    assert f.dtype == expected.dtype
    torch.testing.assert_close(f.double(), expected.double(), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("case", ["topk", "AutoEncoderTopK", "MatryoshkaBatchTopKSAE", "training topk"])
def test_parameters_are_the_same_objects_and_adam_updates_them(case: str) -> None:
    ours, theirs = both(SERVED[case])
    parameters = dict(ours.named_parameters())
    pointers = [torch.optim.Adam(one.parameters(), lr=1e-2) for one in (ours, theirs)]
    accelerate(ours, mixed=False)
    for _ in range(3):
        for sae, adam in zip((ours, theirs), pointers, strict=True):
            adam.zero_grad()
            sae(rows()).square().sum().backward()
            nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            adam.step()
    assert all(p is parameters[name] for name, p in ours.named_parameters())
    assert_same(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("name", ["TopK", "MatryoshkaBatchTopK"])
def test_the_trainer_of_sae_lens(name: str, tmp_path: Path) -> None:
    """Its own loop, with dead latents, its clipping, its Adam (fused for ours), its counts and its checkpoints."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    widths = dict(matryoshka_widths=WIDTHS) if name != "TopK" else {}

    def make() -> Any:
        config = SAETrainerConfig(
            total_training_samples=8 * B, train_batch_size_samples=B, device="cpu", lr=1e-2, lr_end=1e-3,
            dead_feature_window=1, logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        sae = sae_lens(f"{name}TrainingSAE", k=K, **widths)
        return SAETrainer(cfg=config, sae=sae, data_provider=iter([rows(seed) for seed in range(8)]))

    ours, theirs = both(make)
    assert ours.optimizer.param_groups[0]["fused"]
    for one in (ours, theirs):
        one.fit()
    assert int(ours.dead_neurons.sum()) > 0
    torch.testing.assert_close(ours.sae.state_dict(), theirs.sae.state_dict(), rtol=1e-7, atol=1e-7)
    for statistic in ("act_freq_scores", "n_forward_passes_since_fired"):
        assert torch.equal(getattr(ours, statistic), getattr(theirs, statistic))
    for folder, one in (("ours", ours), ("theirs", theirs)):
        one.save_checkpoint(folder, tmp_path)
    ours.load_trainer_state(tmp_path / "theirs")
    files = [tmp_path / folder / "sparsity.safetensors" for folder in ("ours", "theirs")]
    assert files[0].read_bytes() == files[1].read_bytes()
    restore(ours)
    assert ours.optimizer.param_groups[0]["fused"] is not True


def test_the_trainer_of_sae_lens_under_autocast() -> None:
    """Which rounds its own dense products to bf16; ours stay in float32."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    def make() -> Any:
        config = SAETrainerConfig(
            total_training_samples=4 * B, train_batch_size_samples=B, device="cpu", lr=1e-3, lr_end=1e-4,
            dead_feature_window=1, autocast=True, logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        sae = sae_lens("TopKTrainingSAE", k=K, dtype="float32")
        return SAETrainer(cfg=config, sae=sae, data_provider=iter(()))

    ours, theirs = both(make)
    for seed in range(4):
        losses = [float(one.step(rows(seed, dtype=torch.float32)).loss) for one in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert all(p.dtype == torch.float32 for p in ours.sae.parameters())


def test_gradients_lie_as_their_parameters_do() -> None:
    """Else each step of Adam would go through a matrix against the grain."""
    ours = accelerate(sae_lens("TopKTrainingSAE", k=K))
    sae_lens_step(ours, rows(), None)
    assert ours.W_enc.stride() == ours.W_enc.grad.stride() == (1, D)


@pytest.mark.parametrize("case", ["training topk", "AutoEncoderTopK"])
def test_copies_and_pickles_are_accelerated_and_their_own(case: str, tmp_path: Path) -> None:
    ours = accelerate(SERVED[case]())
    others = [copy.deepcopy(ours)]
    if case != "training topk":  # SAELens' own SAEs hold lambdas, which nothing can pickle
        torch.save(ours, tmp_path / "whole.pt")
        others += [pickle.loads(pickle.dumps(ours)), torch.load(tmp_path / "whole.pt", weights_only=False)]
    expected = ours(rows())
    for other in others:
        assert type(other) is type(ours)
        with torch.no_grad():
            assert_same(other(rows()), expected)
            next(p for name, p in other.named_parameters() if name == "b_dec").add_(1)
            assert (other(rows()) - expected).abs().max() > 0.1  # its own weights, not those that it is a copy of
            assert_same(ours(rows()), expected)
        other_state = other.state_dict()
        assert all(value.is_contiguous() for value in other_state.values())
        restore(other)
        assert_same(other.state_dict(), other_state)


def test_sae_lens_saves_and_loads(tmp_path: Path) -> None:
    from sae_lens import SAE, TrainingSAE

    ours, theirs = both(lambda: sae_lens("TopKTrainingSAE", k=K))
    for name, sae in (("ours", ours), ("theirs", theirs)):
        sae.save_model(tmp_path / name)
        sae.save_inference_model(tmp_path / f"{name} served")
    for end in ("", " served"):
        files = [tmp_path / f"{name}{end}" / "sae_weights.safetensors" for name in ("ours", "theirs")]
        assert files[0].read_bytes() == files[1].read_bytes()
    again = TrainingSAE.load_from_disk(tmp_path / "ours")
    assert_same(again.state_dict(), theirs.state_dict())
    served = accelerate(SAE.load_from_disk(tmp_path / "ours served"))
    with torch.no_grad():
        assert_same(served(rows()), theirs(rows()))


def test_sae_lens_folds_its_norms_after_accelerating() -> None:
    """It writes to .data, which no count of writes shows."""
    ours, theirs = both(SERVED["topk, rescaled"])
    for sae in (ours, theirs):
        sae(rows())
        sae.fold_W_dec_norm()
    assert_same(ours.encode(rows()), theirs.encode(rows()))


def test_sparsify_saves_and_loads(tmp_path: Path) -> None:
    from sparsify import SparseCoder

    ours = accelerate(sparse_coder())
    ours.save_to_disk(tmp_path)
    assert_same(SparseCoder.load_from_disk(tmp_path).state_dict(), ours.state_dict())


def test_weights_that_come_later_are_laid_out() -> None:
    ours, theirs = both(SERVED["topk"])
    other = sae_lens("TopKSAE", k=K)
    stirred(other, seed=9)
    ours.load_state_dict(other.state_dict(), assign=True)
    theirs.load_state_dict(other.state_dict())
    assert_same(ours(rows()), theirs(rows()))
    assert ours.W_enc.stride() == (1, D)
    ours.to(dtype=torch.float32), theirs.to(dtype=torch.float32)
    torch.testing.assert_close(ours(rows()), theirs(rows()))


@pytest.mark.parametrize("case", [*SERVED, *(f"trainer, {name}" for name in TRAINERS)])
def test_restore_leaves_nothing_behind(case: str) -> None:
    if case.startswith("trainer"):
        name, settings = TRAINERS[case.removeprefix("trainer, ")]
        thing = trainer(name, **settings)
    else:
        thing = SERVED[case]()
    parts = [thing, thing.ae] if case.startswith("trainer") else [thing]
    before = [dict(vars(part)) for part in parts]
    strides = [[p.stride() for p in part.parameters()] for part in parts if isinstance(part, nn.Module)]
    assert accelerate(thing) is thing
    assert [dict(vars(part)) for part in parts] != before
    assert restore(thing) is thing
    after = [dict(vars(part)) for part in parts]
    assert [found.keys() for found in after] == [expected.keys() for expected in before]
    assert [[p.stride() for p in part.parameters()] for part in parts if isinstance(part, nn.Module)] == strides
    for found, expected in zip(after, before, strict=True):
        assert all(found[key] is value or found[key] == value for key, value in expected.items() if key[0] != "_")
    restore(thing)


HOMES = {
    "sae_lens": ("sae_lens", "sae_lens.saes.transcoder", "sae_lens.training.sae_trainer"),
    "sparsify": ("sparsify",),
    "dictionary_learning": (
        "dictionary_learning.dictionary",
        *(f"dictionary_learning.trainers.{n}" for n in ("top_k", "batch_top_k", "matryoshka_batch_top_k", "jumprelu")),
    ),
}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_class_that_is_named_exists(package: str) -> None:
    modules = [importlib.import_module(name) for name in HOMES[package]]
    for name, kind in PACKAGES[package].kinds.items():
        found = next(getattr(module, name) for module in modules if hasattr(module, name))
        assert all(callable(getattr(found, method)) for method in kind.methods)


def test_refused() -> None:
    with pytest.raises(InputError, match=r"GatedSAE, which accelerate\(\) does not know: expected sae_lens's TopKSAE"):
        accelerate(sae_lens("GatedSAE"))
    from sparsify import SparseCoder, SparseCoderConfig

    class Mine(SparseCoder):
        def encode(self, x: Tensor) -> Any:
            return super().encode(2 * x)

    with pytest.raises(InputError, match=r"Mine, which has its own encode\(\)"):
        accelerate(Mine(D, SparseCoderConfig(num_latents=L, k=K)))

    class Named(SparseCoder):
        pass

    assert accelerate(Named(D, SparseCoderConfig(num_latents=L, k=K))).encode(rows().float()).top_acts.shape == (B, K)
