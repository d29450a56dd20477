"""Trainers for dictionary_learning's `trainSAE` that take saefast's fused step: one import changes in a script.

    from saefast.integrations.dictionary_learning_training import TopKTrainer    # was: dictionary_learning.trainers...
    trainSAE(data, trainer_configs=[dict(trainer=TopKTrainer, activation_dim=768, dict_size=32768, k=32, ...)], ...)

The start, the loss, the schedule, clipping and Adam are dictionary_learning's (0.1.0; preset "dictionary_learning"),
and so are the files: `ae` is an object of its own class. No dense (B, dict_size) tensor is made, no gradient tensor.
What differs is in docs/coming-from.md.
"""

import importlib
import math
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saefast.engines.config import preset
from saefast.engines.fused import FusedEngine
from saefast.errors import InputError
from saefast.integrations.fused_step import row_major, shared
from saefast.models.architecture import Architecture, At, Layer, Term, Terms
from saefast.models.batchtopk import UNSET
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.ops.code import Code, padded
from saefast.version import __version__

# What `loss` returns when it is asked for more than the loss.
LossLog = namedtuple("LossLog", ["x", "x_hat", "f", "losses"])
# A layer laid over what an SAEConfig describes.
Over = Callable[[SAEConfig, Architecture], Architecture]


class TopKTrainer:
    """`dictionary_learning.trainers.top_k.TopKTrainer` with saefast's step.

    Args:
        steps, activation_dim, dict_size, k, layer, lm_name, dict_class, lr, auxk_alpha, warmup_steps, decay_start,
            threshold_beta, threshold_start_step, seed, device, wandb_name, submodule_name: as there.
        settle_every: steps after which the encoder's rows that have not fired are brought up to date. 1 is Adam's
            arithmetic at every step, as dictionary_learning has it; more is faster (`TrainConfig.settle_every`).

    Attributes:
        engine: saefast's FusedEngine.
        effective_l0: latents on per token in the batch trained on last. dead_features: how many are dead after it.
            auxk_loss: its AuxK loss, over the variance of the residual.

    Raises:
        InputError: dictionary_learning is not installed; a size or setting that cannot be.
    """

    module, dict_class_name, activation = "top_k", "AutoEncoderTopK", "topk"
    logging_parameters: ClassVar[list[str]] = ["effective_l0", "dead_features", "auxk_loss"]

    def __init__(
        self,
        steps: int,
        activation_dim: int,
        dict_size: int,
        k: int,
        layer: int,
        lm_name: str,
        dict_class: type | None = None,
        lr: float | None = None,
        auxk_alpha: float = 1 / 32,
        warmup_steps: int = 1000,
        decay_start: int | None = None,
        threshold_beta: float = 0.999,
        threshold_start_step: int = 1000,
        seed: int | None = None,
        device: str | None = None,
        wandb_name: str | None = None,
        submodule_name: str | None = None,
        *,
        settle_every: int = 1,
    ) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._named = dict(layer=layer, lm_name=lm_name, submodule_name=submodule_name, seed=seed)
        self._named["wandb_name"] = wandb_name or self.dict_class_name
        self.seed, self.steps = seed, steps
        sae_config, train_config = preset(
            "dictionary_learning", activation_dim, dict_size, k, activation=self.activation, lr=lr, seed=seed or 0,
            auxk_coef=auxk_alpha, lr_warmup_steps=warmup_steps, threshold_decay=threshold_beta,
            threshold_start=threshold_start_step + 1, lr_decay_start=-1 if decay_start is None else decay_start,
            settle_every=settle_every, **self._fields(),
        )  # fmt: skip
        self._schedule = dict(
            auxk_alpha=auxk_alpha, warmup_steps=warmup_steps, decay_start=decay_start, threshold_beta=threshold_beta,
            threshold_start_step=threshold_start_step,
        )  # fmt: skip
        if seed is not None:
            torch.manual_seed(seed)  # also of every GPU
        self._ae = self._new_ae(self._class(dict_class), sae_config).to(self.device)
        self._trained = _Trained(sae_config, self._over)
        self._share()
        self.engine = FusedEngine(self._trained, train_config, steps)
        self.effective_l0 = self.dead_features = self.auxk_loss = -1.0

    def _fields(self) -> dict[str, Any]:
        """What the preset is asked for besides."""
        return {}

    def _class(self, given: type | None) -> type:
        """The dictionary's class: dictionary_learning's own, or the given one that is made from it."""
        try:
            module = importlib.import_module(f"dictionary_learning.trainers.{self.module}")
        except ModuleNotFoundError as error:
            raise InputError(
                f"{type(self).__name__} is for the training loop of dictionary_learning, and {error.name!r} is not "
                "installed: pip install dictionary-learning"
            ) from error
        own: type = getattr(module, self.dict_class_name)
        if given is not None and not (isinstance(given, type) and issubclass(given, own)):
            raise InputError(
                f"dict_class is {given!r}: expected {own.__name__} of dictionary_learning, or a class made from it"
            )
        return given or own

    def _new_ae(self, kind: type, config: SAEConfig) -> Any:
        return kind(config.d_in, config.n_latents, config.k)

    def _over(self, config: SAEConfig, architecture: Architecture) -> Architecture:
        return MeanSmallest(config, architecture)

    def _share(self) -> None:
        """Makes one set of weights of dictionary_learning's object and ours: its decoder is a transposed view."""
        ae, sae = self._ae, self._trained
        sae.take(ae.encoder.weight, ae.decoder.weight.T, ae.encoder.bias, ae.b_dec, ae.threshold)
        ae.encoder.weight, ae.encoder.bias, ae.b_dec, ae.threshold = sae.W_enc, sae.b_enc, sae.b_dec, sae.threshold
        ae.decoder.weight = nn.Parameter(sae.W_dec.detach().T)
        ae.register_state_dict_post_hook(row_major)

    @property
    def ae(self) -> Any:
        """dictionary_learning's own object, its weights those of now: to be read or saved, and taken anew after a step.

        Its tensors are the ones that are trained.
        """
        self.engine.settle()
        return self._ae

    @property
    def sae(self) -> SAE:
        """The same weights as a `saefast.SAE`, to be taken anew after a step."""
        self.engine.settle()
        return self._trained.plain()

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return self.engine.config.lr

    @property
    def dead_feature_threshold(self) -> int:
        """Tokens without firing after which a latent is dead."""
        return self.engine.config.dead_after

    @dead_feature_threshold.setter
    def dead_feature_threshold(self, tokens: int) -> None:
        self.engine.config.dead_after = tokens

    @property
    def num_tokens_since_fired(self) -> Tensor:
        """(dict_size,) int64."""
        return self.engine.dead.since

    def update(self, step: int, x: Tensor) -> float:
        """One training step from x (B, activation_dim). -> Its loss.

        Raises:
            InputError: x is of another shape, or the loss is not finite: nothing has changed then.
        """
        x = x.to(self.device)
        if step == 0:
            self.engine.initialise(x)
        stats = self.engine.step(x)
        self.effective_l0, self.auxk_loss = float(stats.l0), float(stats.auxk_loss)
        self.dead_features = float(stats.dead_share) * self._trained.config.n_latents
        return float(stats.loss)

    def loss(self, x: Tensor, step: int | None = None, logging: bool = False) -> Any:
        """The loss of x (B, activation_dim) with the weights of now, a number: nothing is changed by asking.

        With logging, LossLog(x, x_hat, f, losses): f is dense (B, dict_size), as `trainSAE` wants it.
        """
        seen = self.engine.look(x.to(self.device))
        found = seen.gradient
        if not logging:
            return float(found.loss)
        assert found.error is not None
        entries = padded(seen.code, self._trained.config.n_latents)
        f = x.new_zeros(len(x), self._trained.config.n_latents, dtype=found.error.dtype, device=self.device)
        f.scatter_(1, entries.idx.long(), entries.acts.to(f.dtype))
        auxk, alpha = float(found.auxk), self.engine.config.auxk_coef
        losses = {"l2_loss": float(found.loss) - alpha * auxk, "auxk_loss": auxk, "loss": float(found.loss)}
        return LossLog(x, seen.x - found.error, f, losses)

    def get_logging_parameters(self) -> dict[str, float]:
        """Figures of the step taken last."""
        return {name: getattr(self, name) for name in self.logging_parameters}

    @property
    def config(self) -> dict[str, Any]:
        """What `trainSAE` writes into config.json: dictionary_learning's own entries, by which it loads the SAE."""
        sae = self._trained.config
        return {
            "trainer_class": type(self).__name__,
            "dict_class": self.dict_class_name,
            "lr": self.lr,
            "steps": self.steps,
            **self._schedule,
            "activation_dim": sae.d_in,
            "dict_size": sae.n_latents,
            "k": sae.k,
            "device": self.device,
            **self._named,
            "saefast_version": __version__,
            "settle_every": self.engine.settle_every,
        }


class BatchTopKTrainer(TopKTrainer):
    """`dictionary_learning.trainers.batch_top_k.BatchTopKTrainer` with saefast's step. Arguments as TopKTrainer.

    The threshold is set by the run's last step at the latest: with none, every positive latent would be served.
    """

    module, dict_class_name, activation = "batch_top_k", "BatchTopKSAE", "batchtopk"

    def _over(self, config: SAEConfig, architecture: Architecture) -> Architecture:
        return architecture


class MatryoshkaBatchTopKTrainer(BatchTopKTrainer):
    """`dictionary_learning.trainers.matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer` with saefast's step.

    Args:
        group_fractions: shares of the dictionary, which add up to 1; the last group has what rounding leaves.
        group_weights: what each nested dictionary's loss counts; None is the same for all.
        settings: as TopKTrainer.
    """

    module, dict_class_name = "matryoshka_batch_top_k", "MatryoshkaBatchTopKSAE"

    def __init__(
        self,
        steps: int,
        activation_dim: int,
        dict_size: int,
        k: int,
        layer: int,
        lm_name: str,
        group_fractions: Sequence[float],
        group_weights: Sequence[float] | None = None,
        **settings: Any,
    ) -> None:
        if not math.isclose(sum(group_fractions), 1.0) or min(group_fractions) <= 0:
            raise InputError(f"group_fractions is {group_fractions!r}: expected shares above 0 that add up to 1")
        sizes = [int(share * dict_size) for share in group_fractions[:-1]]
        self.group_sizes = [*sizes, dict_size - sum(sizes)]
        self.group_fractions, n = list(group_fractions), len(self.group_sizes)
        self.group_weights = [1 / n] * n if group_weights is None else list(group_weights)
        if len(self.group_weights) != n:
            raise InputError(
                f"group_weights has {len(self.group_weights)} numbers for {n} groups: expected one for each"
            )
        super().__init__(steps, activation_dim, dict_size, k, layer, lm_name, **settings)

    def _fields(self) -> dict[str, Any]:
        ends = torch.tensor(self.group_sizes, dtype=torch.int64, device="cpu").cumsum(0)
        return {"matryoshka": tuple(ends.tolist())}

    def _new_ae(self, kind: type, config: SAEConfig) -> Any:
        return kind(config.d_in, config.n_latents, config.k, self.group_sizes)

    def _over(self, config: SAEConfig, architecture: Architecture) -> Architecture:
        return Weighted(config, architecture, self.group_weights)

    def _share(self) -> None:
        ae, sae = self._ae, self._trained
        sae.take(ae.W_enc.T, ae.W_dec, ae.b_enc, ae.b_dec, ae.threshold)
        ae.W_dec, ae.b_enc, ae.b_dec, ae.threshold = sae.W_dec, sae.b_enc, sae.b_dec, sae.threshold
        ae.W_enc = nn.Parameter(sae.W_enc.detach().T)
        ae.register_state_dict_post_hook(row_major)

    @property
    def config(self) -> dict[str, Any]:
        names = "group_fractions", "group_weights", "group_sizes"
        return super().config | {name: getattr(self, name) for name in names}


class MeanSmallest(Layer):
    """TopK that also keeps dictionary_learning's threshold: a running mean of the tokens' smallest activations."""

    def buffers(self) -> dict[str, Tensor]:
        return super().buffers() | {"threshold": torch.tensor(UNSET, dtype=torch.float32, device="cpu")}

    def observed(self, kept: dict[str, Tensor], code: Code, scale: Tensor | None, at: At, train: Any) -> Any:
        if at.step < train.threshold_start:
            return kept
        smallest = torch.where(code.acts > 0, code.acts, math.inf).amin(1)
        has_one, threshold = smallest.isfinite(), kept["threshold"]
        # A token with no positive activation says nothing of how small one can be.
        now = torch.where(has_one, smallest, 0).sum().float() / has_one.sum()
        mean = torch.where(threshold < 0, now, threshold.lerp(now, 1 - train.threshold_decay))
        return kept | {"threshold": torch.where(has_one.any(), mean, threshold)}


class Weighted(Layer):
    """Matryoshka whose nested dictionaries count as much as dictionary_learning's weights say: the mean of them all."""

    def __init__(self, config: SAEConfig, inner: Architecture, weights: Sequence[float]) -> None:
        super().__init__(config, inner)
        self.weights = weights

    def terms(self, train: Any, at: At) -> Terms:
        found, n = super().terms(train, at), len(self.weights)
        prefixes = zip(found.prefixes, self.weights, strict=True)
        return found._replace(prefixes=tuple(Term(term.bound, weight / n) for term, weight in prefixes))


class _Trained(SAE):
    """The SAE that is trained: what its config describes, with a layer over it that is this loop's alone."""

    def __init__(self, config: SAEConfig, over: Over) -> None:
        self._laid_over = over
        super().__init__(config, device="meta")

    @property
    def architecture(self) -> Architecture:
        return self._laid_over(self.config, self.config.architecture())

    def take(self, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, threshold: Tensor) -> None:
        """Has these tensors from now on, W_enc and W_dec (L, D)."""
        given = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}
        shared(self, {name: tensor.contiguous() for name, tensor in given.items()})

    def plain(self) -> SAE:
        """The same tensors without that layer."""
        found = SAE(self.config, device="meta")
        known, state = found.state_dict(), self.state_dict()
        shared(found, {name: state[name] for name in known})
        return found
