"""The classes of sae_lens_training: made from SAELens' own, which is imported here."""

import json
import warnings
from pathlib import Path
from typing import Any

import sae_lens
import torch
from torch import Tensor

from saefast.engines.config import TrainConfig, preset
from saefast.errors import InputError
from saefast.integrations import accelerate_ops as ops
from saefast.integrations.accelerate import accelerate
from saefast.integrations.accelerate_state import Later, hooked, with_late_field
from saefast.integrations.fused_step import StepInLoop, replaced, row_major, shared
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.ops.code import padded


class _Accelerated:
    """A training SAE of SAELens that begins accelerated; see `saefast.accelerate`."""

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)  # type: ignore[call-arg]
        accelerate(self)

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Writes weights and cfg.json into a folder, under the architecture that SAELens calls it by itself."""
        weights, file = super().save_model(path)  # type: ignore[misc]
        config = json.loads(file.read_text(encoding="utf-8"))
        config["architecture"] = config["architecture"].removeprefix(PREFIX)
        file.write_text(json.dumps(config), encoding="utf-8")
        return weights, file


PREFIX = "saefast_"


class TopKTrainingSAEConfig(sae_lens.TopKTrainingSAEConfig):
    """`sae_lens.TopKTrainingSAEConfig`."""

    @classmethod
    def architecture(cls) -> str:
        return PREFIX + super().architecture()

    def get_inference_config_class(self) -> type:
        return sae_lens.TopKSAEConfig


class TopKTrainingSAE(_Accelerated, sae_lens.TopKTrainingSAE):
    """`sae_lens.TopKTrainingSAE`, accelerated: codes are sparse in training, and no (B, d_sae) tensor is made."""


class BatchTopKTrainingSAEConfig(sae_lens.BatchTopKTrainingSAEConfig):
    """`sae_lens.BatchTopKTrainingSAEConfig`."""

    @classmethod
    def architecture(cls) -> str:
        return PREFIX + super().architecture()


class BatchTopKTrainingSAE(_Accelerated, sae_lens.BatchTopKTrainingSAE):
    """`sae_lens.BatchTopKTrainingSAE`, accelerated."""


class MatryoshkaBatchTopKTrainingSAEConfig(sae_lens.MatryoshkaBatchTopKTrainingSAEConfig):
    """`sae_lens.MatryoshkaBatchTopKTrainingSAEConfig`."""

    @classmethod
    def architecture(cls) -> str:
        return PREFIX + super().architecture()


class MatryoshkaBatchTopKTrainingSAE(_Accelerated, sae_lens.MatryoshkaBatchTopKTrainingSAE):
    """`sae_lens.MatryoshkaBatchTopKTrainingSAE`, accelerated."""


for sae, config in (
    (TopKTrainingSAE, TopKTrainingSAEConfig),
    (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
):
    sae_lens.register_sae_training_class(config.architecture(), sae, config)


class SAETrainer(sae_lens.SAETrainer):
    """`sae_lens.SAETrainer` that trains TopK and BatchTopK SAEs by saefast's fused step: no gradient tensor is made.

    The loop, its schedules, logs and checkpoints are SAELens', the SAE's parameters stay the same objects, and the
    update is the one that SAELens' Adam would make. The moments are saefast's: a checkpoint has them in ENGINE. Other
    SAEs, and settings that the fused step does not have, are accelerated and trained by SAELens' Adam: a RuntimeWarning
    says why.

    Arguments as sae_lens.SAETrainer.

    Attributes:
        fused: makes the steps; None where it does not, or before the first one.

    Raises:
        InputError: while training: a loss that is not finite, hooks on the SAE, weights that were exchanged in a run.
    """

    def __init__(self, cfg: Any, sae: Any, data_provider: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(cfg, sae, data_provider, *args, **kwargs)
        self.fused: StepInLoop | None = None
        self._ours: Any = None
        self._engine_state: Any = None
        self._why_not = _why_not(sae)
        if self._why_not is None:
            sae.register_state_dict_post_hook(row_major)
            return
        warnings.warn(f"the SAE is trained by SAELens' Adam: {self._why_not}", RuntimeWarning, stacklevel=2)
        accelerate(sae, self.optimizer)

    def step(self, batch: Tensor) -> Any:
        """One training step. -> TrainStepOutput, with sparse feature_acts."""
        if self._why_not is not None:
            return super().step(batch)
        self._take_weights()
        # For this step alone: elsewhere the SAE is what it was.
        with replaced(self.sae, training_forward_pass=self._forward_pass):
            output = super().step(batch)
        if hasattr(self.sae, "topk_threshold"):
            self.sae.topk_threshold.copy_(self._ours.threshold)
        return output

    def _take_weights(self) -> None:
        """Before the first step, once the SAE is where it is trained: our SAE over its tensors, and the engine."""
        sae = self.sae
        if self.fused is not None:
            pairs = [(getattr(sae, name), getattr(self._ours, name)) for name in ("W_enc", "W_dec", "b_enc", "b_dec")]
            if any(theirs.data_ptr() != mine.data_ptr() for theirs, mine in pairs):
                raise InputError(
                    "the SAE's weights were exchanged or moved in the middle of a run: begin a new trainer"
                )
            return
        sae_config, train_config = _recipe(self.cfg, sae)
        # A latent is a contiguous row in our layout; the shape and the Parameter stay.
        sae.W_enc.data = sae.W_enc.data.T.contiguous().T
        tensors = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
        if hasattr(sae, "topk_threshold"):
            tensors["threshold"] = sae.topk_threshold.float()
        self._ours = ours = SAE(sae_config, device="meta")
        shared(ours, tensors)
        self.fused = StepInLoop(ours, train_config, "SAELens' trainer")
        self.fused.follow(self.optimizer)
        if self._engine_state is not None:
            self.fused.engine.load_state_dict(self._engine_state)

    def _forward_pass(self, step_input: Any) -> Any:
        """What stands for the SAE's training_forward_pass."""
        sae = self.sae
        assert self.fused is not None
        if hooked(*sae.hook_dict.values()):
            raise InputError(
                "the SAE has hooks, which the fused step would not run: remove them, or train with SAELens' trainer "
                "and the TopKTrainingSAE of sae_lens_training"
            )
        seen = self.fused.look(step_input.sae_in.to(sae.dtype))
        found, loss = seen.gradient, self.fused.noted(seen, seen.gradient.loss)
        assert found.error is not None
        auxk = self.fused.engine.config.auxk_coef * found.auxk
        losses = {"mse_loss": found.loss - auxk, "auxiliary_reconstruction_loss": auxk}
        code = padded(seen.code, sae.cfg.d_sae)
        acts = ops.times(code, ops.norms_of(sae.W_dec.detach())) if sae.cfg.rescale_acts_by_decoder_norm else code
        kind = with_late_field(sae_lens.saes.sae.TrainStepOutput, "hidden_pre")
        return kind(
            sae_in=step_input.sae_in,
            sae_out=seen.target - found.error,
            feature_acts=ops.sparse(acts, sae.cfg.d_sae),
            hidden_pre=Later("hidden_pre", lambda: sae.encode_with_hidden_pre(seen.x)[1], sae.W_enc, sae.W_dec),
            loss=loss,
            losses={
                name: torch.as_tensor(value, dtype=torch.float32, device=loss.device) for name, value in losses.items()
            },
            metrics={"topk_threshold": sae.topk_threshold} if hasattr(sae, "topk_threshold") else {},
        )

    def save_trainer_state(self, checkpoint_path: Path) -> None:
        """Writes SAELens' trainer state, and the engine's beside it."""
        super().save_trainer_state(checkpoint_path)
        if self.fused is not None:
            torch.save(self.fused.engine.state_dict(), checkpoint_path / ENGINE)

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """Goes on from a checkpoint: call it before the first step, with the checkpoint's weights in the SAE.

        Raises:
            InputError: the checkpoint is of another trainer and has no state of the engine.
        """
        super().load_trainer_state(checkpoint_path)
        if self._why_not is not None:
            return
        file = Path(checkpoint_path) / ENGINE
        if not file.is_file():
            raise InputError(f"{file} is missing: the checkpoint is of SAELens' own trainer; go on with that one")
        self._engine_state = torch.load(file, map_location=self.cfg.device, weights_only=True)


# The engine's state in a checkpoint's folder.
ENGINE = "saefast_engine.pt"
# Classes that the fused step trains, exactly: a subclass may compute something else.
FUSED = {sae_lens.TopKTrainingSAE: "topk", sae_lens.BatchTopKTrainingSAE: "batchtopk"}
FUSED |= {TopKTrainingSAE: "topk", BatchTopKTrainingSAE: "batchtopk"}


def _why_not(sae: Any) -> str | None:
    """Why the fused step cannot train an SAE; None if it can."""
    if type(sae) not in FUSED:
        return f"the fused step trains TopK and BatchTopK, not {type(sae).__name__}"
    if sae.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale"):
        return f"normalize_activations is {sae.cfg.normalize_activations!r}, which the fused step does not have"
    if sae.dtype != torch.float32:
        return f"the fused step trains float32, not {sae.dtype}"
    if sae.cfg.k != int(sae.cfg.k):
        return f"k is {sae.cfg.k}, and the fused step knows whole numbers"
    return None


def _recipe(cfg: Any, sae: Any) -> tuple[SAEConfig, TrainConfig]:
    """SAELens' settings as ours: preset "saelens" says the rest."""
    values: dict[str, Any] = dict(
        activation=FUSED[type(sae)], apply_b_dec_to_input=sae.cfg.apply_b_dec_to_input,
        rescale_acts_by_decoder_norm=sae.cfg.rescale_acts_by_decoder_norm, auxk_coef=sae.cfg.aux_loss_coefficient,
        dead_after=cfg.dead_feature_window + 1, beta1=cfg.adam_beta1, beta2=cfg.adam_beta2,
    )  # fmt: skip
    if hasattr(sae.cfg, "topk_threshold_lr"):
        values["threshold_decay"] = 1 - sae.cfg.topk_threshold_lr
    return preset("saelens", sae.cfg.d_in, sae.cfg.d_sae, int(sae.cfg.k), **values)
