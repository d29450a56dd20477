"""The class of sparsify_training: made from sparsify's own, which is imported here."""

import contextlib
import functools
import warnings
from pathlib import Path
from typing import Any

import sparsify
import torch
from torch import Tensor

from saefast.engines.config import preset
from saefast.errors import InputError
from saefast.integrations.accelerate import accelerate
from saefast.integrations.fused_step import StepInLoop, replaced
from saefast.models.sae import SAE
from saefast.ops.code import padded

# The engines' states in a checkpoint's folder.
ENGINES = "saefast_engines.pt"


class Trainer(sparsify.Trainer):
    """`sparsify.Trainer`, its SAEs trained by saefast's fused step where cfg.optimizer is "adam".

    Other optimisers, and settings that the fused step does not have (accumulated gradients, loss_fn "ce" and "kl",
    transcoders, a k that decays, several processes), get accelerated SAEs: a RuntimeWarning says why. Gradients are
    those of the loss: sparsify sends the encoder none from AuxK and MultiTopK, and some through where ReLU clipped.

    Args:
        cfg, dataset, model: as there.
        reproduce_bugs: sparsify's gradients instead, of accelerated SAEs.

    Attributes:
        fused: by SAE's name, what makes its steps; empty where SAEs are accelerated.
    """

    def __init__(self, cfg: Any, dataset: Any, model: Any, *, reproduce_bugs: bool = False) -> None:
        super().__init__(cfg, dataset, model)
        self.fused: dict[str, StepInLoop] = {}
        why = _why_not(cfg, self.optimizers) or ("reproduce_bugs is set" if reproduce_bugs else None)
        if why is None:
            for group, (name, coder) in enumerate(self.saes.items()):
                self.fused[name] = _fused_step(cfg, coder, name)
                self.fused[name].follow(self.optimizers[0], group)
            return
        warnings.warn(f"the SAEs are trained by sparsify's optimiser: {why}", RuntimeWarning, stacklevel=2)
        adam = next((one for one in self.optimizers if type(one) is torch.optim.Adam), None)
        for coder in self.saes.values():
            accelerate(coder, adam, reproduce_bugs=reproduce_bugs)

    def fit(self) -> None:
        """Trains. Between calls the SAEs are sparsify's own."""
        with contextlib.ExitStack() as during:
            for name, step in self.fused.items():
                coder = self.saes[name]
                instead = dict(
                    forward=functools.partial(_forward, coder, step),
                    # The step does both itself: unit norm before the forward, the gradient's part along each row.
                    set_decoder_norm_to_unit_norm=_nothing,
                    remove_gradient_parallel_to_decoder_directions=_nothing,
                )
                during.enter_context(replaced(coder, **instead))
            super().fit()

    def save(self) -> None:
        """Writes sparsify's checkpoint, and the engines' states beside it."""
        super().save()
        if self.fused:
            states = {name: step.engine.state_dict() for name, step in self.fused.items()}
            torch.save(states, f"{self.cfg.save_dir}/{self.cfg.run_name or 'unnamed'}/{ENGINES}")

    def load_state(self, path: str) -> None:
        """Goes on from a checkpoint.

        Raises:
            InputError: it is of sparsify's own trainer and has no states of engines.
        """
        super().load_state(path)
        file = Path(path) / ENGINES
        if not self.fused:
            return
        if not file.is_file():
            raise InputError(f"{file} is missing: the checkpoint is of sparsify's own trainer; go on with that one")
        states = torch.load(file, map_location=self.model.device, weights_only=True)
        for name, step in self.fused.items():
            step.engine.load_state_dict(states[name])


def _nothing() -> None:
    """What the fused step has done already."""


def _why_not(cfg: Any, optimizers: list[Any]) -> str | None:
    """Why the fused step cannot train by these settings; None if it can."""
    wrong = {
        "optimizer is not 'adam'": cfg.optimizer != "adam",
        "optimizer is another Adam than torch's": [type(one) for one in optimizers] != [torch.optim.Adam],
        "gradients are accumulated": cfg.grad_acc_steps != 1 or cfg.micro_acc_steps != 1,
        "loss_fn is not 'fvu'": cfg.loss_fn != "fvu",
        "k decays": cfg.k_decay_steps != 0,
        "transcode or skip_connection is set": cfg.sae.transcode or cfg.sae.skip_connection,
        "activation is not 'topk'": cfg.sae.activation != "topk",
        "there are several processes": torch.distributed.is_available() and torch.distributed.is_initialized(),
    }
    return next((reason for reason, holds in wrong.items() if holds), None)


def _fused_step(cfg: Any, coder: Any, name: str) -> StepInLoop:
    """The step of one SparseCoder, whose parameters our SAE has too."""
    values: dict[str, Any] = dict(
        auxk_coef=cfg.auxk_alpha, multi_topk_coef=1 / 8 if cfg.sae.multi_topk else 0.0,
        dead_after=cfg.dead_feature_threshold + 1,
    )  # fmt: skip
    if not cfg.sae.normalize_decoder:
        values |= dict(unit_norm_decoder=False, decoder_norm="never", project_decoder_grad=False)
    sae_config, train_config = preset("sparsify", coder.d_in, coder.num_latents, cfg.sae.k, **values)
    ours = SAE(sae_config, device="meta")
    ours.W_enc, ours.b_enc = coder.encoder.weight, coder.encoder.bias
    ours.W_dec, ours.b_dec = coder.W_dec, coder.b_dec
    return StepInLoop(ours, train_config, f"sparsify's trainer of {name}")


def _forward(
    coder: Any,
    step: StepInLoop,
    x: Tensor,
    y: Tensor | None = None,
    *,
    dead_mask: Tensor | None = None,
    total_variance: Tensor | None = None,
) -> Any:
    """What stands for SparseCoder.forward: the variance is the batch's, and the step knows what is dead."""
    seen = step.look(x.to(coder.dtype))
    found, alpha = seen.gradient, step.engine.config.auxk_coef
    assert found.error is not None
    code, k = padded(seen.code, coder.num_latents), coder.cfg.k
    multi = 8 * (found.loss - found.fvu - alpha * found.auxk) if coder.cfg.multi_topk else 0.0
    auxk, multi = (torch.as_tensor(value, dtype=torch.float32, device=x.device) for value in (found.auxk, multi))
    acts, idx = code.acts[:, :k], code.idx[:, :k].long()
    return sparsify.sparse_coder.ForwardOutput(
        seen.target - found.error, acts, idx, step.noted(seen, found.fvu), auxk, multi
    )
