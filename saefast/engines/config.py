"""TrainConfig: every choice in the maths of a training step, and presets that reproduce each peer's.

The presets follow the peers' published code: OpenAI sparse_autoencoder, EleutherAI sparsify 1.3.3,
dictionary_learning 0.1.0 and SAELens 6.54, in their TopK + Adam form; and two papers, in their ReLU + L1 form.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from saefast.errors import InputError
from saefast.models import registry
from saefast.models.config import SAEConfig, tuples_from_lists
from saefast.models.init import BiasInit
from saefast.models.outliers import check_multiple
from saefast.schema import Seed, check, check_argument, check_fields
from saefast.typed import typed

Preset = Literal[
    "saefast", "openai", "sparsify", "dictionary_learning", "saelens", "towards_monosemanticity",
    "scaling_monosemanticity",
]  # fmt: skip

if TYPE_CHECKING:
    # What a type checker cannot read: fields that architectures bring along.
    ArchitectureFields: Any = object
else:
    ArchitectureFields = registry.fields("TrainFields")


@dataclass
class TrainConfig(ArchitectureFields):
    """Settings of `train()`. Rates and counts are per optimiser step unless a unit is given.

    What is None is chosen when a run begins, from the SAE's sizes and the number of tokens: see
    `saefast.engines.recipe.choose`. config.json holds the numbers.

    Attributes:
        n_tokens: tokens to train on; None is n_epochs times the data.
        n_epochs: passes over the data where n_tokens is None; None is one, or more where the data is small.
        batch_size: tokens per step.
        seed: of weights and of the order of the data.
        engine: "fused" works on the B·k entries that fired; "autograd" is plain torch with dense gradients.
        device: where to train; "auto" is the GPU if there is one.

        optimizer: "adam", or "adam-lean" (bf16 weights, 8-bit first moment; fused engine only).
        lr: peak learning rate.
        lr_rule: how lr is chosen where it is None: "tokens" is ours, "latents" 2e-4 / sqrt(n_latents / 2^14), the rule
            of dictionary_learning and sparsify.
        beta1: Adam's decay of the first moment.
        beta2: Adam's decay of the second moment.
        eps: Adam's, added to the root of the second moment.
        lr_warmup_steps: steps of linear warm-up.
        lr_warmup_from_zero: step 0 has rate 0 (a torch LambdaLR); False starts at lr / lr_warmup_steps.
        lr_decay_share: last share of the steps over which the rate falls linearly to lr_end · lr.
        lr_decay_start: step the fall begins at, instead of lr_decay_share; -1 is never. It never begins before the
            end of the warm-up.
        lr_end: final rate as a share of lr.
        settle_every: fused engine only: W_enc's rows that have not fired are brought up to date every so many steps; 1
            is dense Adam's arithmetic at every step, at its cost (see `saefast.engines.fused`). Larger numbers leave
            more latents dead (bench/quality.py).
        max_grad_norm: clip the global gradient norm to this; None does not clip.

        loss: "fvu" Σe² / Σ(x - mean)²; "sum" mean over tokens of Σ_d e²; "scaled_mse" mean of e² over the variance
            of the first rows seen (e = x - x_hat).
        resample_every: steps after which latents that are dead begin anew, at residuals drawn by their squared norm; 0
            is never.
        resample_until: share of the run after which none do.
        resample: what they begin anew at: "residuals" of the last batch, or "inputs" as Bricken et al. (2023) published
            it, drawn by the square of their loss (see `saefast.engines.draw`).
        resample_steps: steps after which they do, instead of resample_every and resample_until.
        resample_rows: of resample "inputs", the last rows before such a step that it draws from, in whole batches.
        auxk_coef: weight of the AuxK loss (Gao et al. 2024, appendix A.2); 0 turns it off.
        auxk_k: dead latents used per token; None is d_in // 2.
        auxk_scale_few_dead: multiply by min(n_dead / auxk_k, 1).
        auxk_denominator: AuxK's squared error over the variance of the "residual", of the "inputs", or "none"
            (mean over tokens of the sum).
        auxk_relu: clip AuxK's activations at zero.
        auxk_b_dec_grad: the AuxK loss also moves b_dec.
        dead_after: a latent that has not fired for this many tokens (or steps) is dead.
        dead_unit: "tokens" or "steps".
        dead_start: what the counters of latents that never fired begin at; OpenAI's lag one step behind, -1.
        dead_update_first: the current batch counts before AuxK picks the dead latents.
        fired_above: a latent fires where its activation exceeds this; None counts every selected latent.

        decoder_norm: when rows are set to unit norm: "pre_forward", "pre_step" (between gradient and update),
            "post_step" or "never".
        project_decoder_grad: take out the gradient's part along each decoder row.
        b_dec_init: pre-bias from the first rows: "zeros", "mean" or "geometric_median".
        init_rows: rows that initialisation looks at.
        init_encoder_scale: divide W_enc so that random directions come back at unit length (OpenAI).
        fit_encoder: multiply W_enc by the number with which the first rows are reconstructed best, so that a run never
            begins worse than the mean.
        normalize: scale inputs by one number, folded into the saved biases: "median" (median distance from the centre
            √d_in: neither a mean far from 0 nor a few huge rows matter), "sqrt_d" (mean norm √d_in), "unit_mean_square"
            (mean squared norm 1) or "none".
        max_norm_multiple: rows farther from the centre than this many times the median distance, both of the first
            rows, are left out of training: attention sinks, which would hold nearly all of the variance. "auto" is 5,
            unless more than 2 % of the first rows are beyond; None leaves nothing out. The SAE serves all rows.
        ema_decay: also keep an exponential moving average of the weights, bias-corrected; None does not.
        reproduce_bugs: as in sparsify 1.3.3, AuxK and MultiTopK send the encoder no gradient, ReLU's derivative is
            skipped, and with MultiTopK the top 4k latents count as fired rather than the top k.

        log_every: steps between lines of metrics.jsonl; 0 is never.
        save_every: steps between checkpoints; 0 is never.
        eval_every: steps between values of the held-out FVU, each over few rows (the last one over all of them, up to
            65,536); None is about 20 times in a run; 0 is never.
        stop_at_plateau: where the held-out FVU at the peak rate falls by less than 1 % per doubling of tokens, begin
            the decay at once, and end with it.
    """

    n_tokens: int | None = None
    n_epochs: int | None = None
    batch_size: int | None = None
    seed: int = 0
    engine: Literal["fused", "autograd"] = "fused"
    device: str = "auto"

    optimizer: Literal["adam", "adam-lean"] = "adam"
    lr: float | None = None
    lr_rule: Literal["tokens", "latents"] = "tokens"
    beta1: float = 0.5
    beta2: float = 0.999
    eps: float = 1e-8
    lr_warmup_steps: int | None = None
    lr_warmup_from_zero: bool = False
    lr_decay_share: float = 0.5
    lr_decay_start: int | None = None
    lr_end: float = 0.0
    settle_every: int = 4
    max_grad_norm: float | None = None

    loss: Literal["fvu", "sum", "scaled_mse"] = "fvu"
    resample_every: int | None = None
    resample_until: float = 0.8
    resample: Literal["residuals", "inputs"] = "residuals"
    resample_steps: tuple[int, ...] | None = None
    resample_rows: int = 819_200
    auxk_coef: float = 0.0
    auxk_k: int | None = None
    auxk_scale_few_dead: bool = True
    auxk_denominator: Literal["residual", "inputs", "none"] = "residual"
    auxk_relu: bool = True
    auxk_b_dec_grad: bool = False
    dead_after: int | None = None
    dead_unit: Literal["tokens", "steps"] = "tokens"
    dead_start: int = 0
    dead_update_first: bool = True
    fired_above: float | None = 0.0

    decoder_norm: Literal["pre_forward", "pre_step", "post_step", "never"] = "post_step"
    project_decoder_grad: bool = True
    b_dec_init: BiasInit = "geometric_median"
    init_rows: int | None = None
    init_encoder_scale: bool = False
    fit_encoder: bool = True
    normalize: Literal["median", "sqrt_d", "unit_mean_square", "none"] = "median"
    max_norm_multiple: float | Literal["auto"] | None = "auto"
    ema_decay: float | None = None
    reproduce_bugs: bool = False

    log_every: int = 10
    save_every: int = 1000
    eval_every: int | None = None
    stop_at_plateau: bool = False

    def __post_init__(self) -> None:
        tuples_from_lists(self)
        check_fields(self)
        check_argument("seed", self.seed, Seed)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and abs(value) >= 2**63:
                raise InputError(f"{field.name} is {value!r}: expected less than 2**63")
        self._check_numbers()
        self._check_pairs()
        registry.check("TrainFields", self)

    def _check_numbers(self) -> None:
        limits = {
            "batch_size": 1, "n_tokens": 1, "n_epochs": 1, "auxk_k": 1, "init_rows": 1, "dead_after": 1,
            "lr_warmup_steps": 0, "resample_every": 0, "auxk_coef": 0, "lr": 0, "eps": 0, "lr_end": 0, "log_every": 0,
            "save_every": 0, "eval_every": 0, "settle_every": 1, "resample_rows": 1,
        }  # fmt: skip
        for name, least in limits.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise InputError(f"{name} is {value!r}: expected at least {least}, and finite")
        for name in ("lr_decay_share", "resample_until"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)!r}: expected a number between 0 and 1")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise InputError(f"{name} is {value!r}: expected a number from 0 up to, not including, 1")
        if self.fired_above is not None and not math.isfinite(self.fired_above):
            raise InputError(f"fired_above is {self.fired_above!r}: expected a finite number, or None")
        check_multiple(self.max_norm_multiple)
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise InputError(f"max_grad_norm is {self.max_grad_norm!r}: expected more than 0, or None to not clip")

    def _check_pairs(self) -> None:
        steps = self.resample_steps
        if steps is not None and (any(step < 1 for step in steps) or list(steps) != sorted(set(steps))):
            raise InputError(f"resample_steps is {steps!r}: expected numbers of steps from 1 on, ascending, or None")
        if self.stop_at_plateau and self.eval_every == 0:
            raise InputError(
                "stop_at_plateau is True and eval_every is 0: a plateau is told by the held-out FVU; set eval_every to "
                "None, or to a number of steps"
            )
        if self.reproduce_bugs and self.engine == "fused":
            raise InputError("reproduce_bugs needs engine='autograd': the fused engine has no such mode")
        if 0 < self.beta1 >= self.beta2**0.5:
            raise InputError(
                f"beta1 is {self.beta1!r} and beta2 {self.beta2!r}: expected beta1 < √beta2, for Adam forgets squares "
                "faster than momentum otherwise, and a latent that rests moves ever faster; raise beta2 or lower beta1"
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(check(values, dict[str, Any], "train config").keys() - known):
            raise InputError(f"train config has unknown keys {unknown}: expected some of {sorted(known)}")
        return cls(**values)


TrainConfig.__doc__ = f"{str(TrainConfig.__doc__).rstrip()}\n\n{registry.described('TrainFields')}    "


# Tokens a step where a peer leaves that to the user.
PEERS_BATCH = 4096
# What the peers share, and ours chooses by itself.
_PEERS: dict[str, Any] = dict(
    n_epochs=1,
    batch_size=PEERS_BATCH,
    lr_rule="latents",
    lr_warmup_steps=0,
    dead_after=10_000_000,
    fit_encoder=False,
    beta1=0.9,
    auxk_coef=1 / 32,
    resample_every=0,
    lr_decay_share=0.2,
)

# What two papers on ReLU with L1 share.
_PAPERS: dict[str, Any] = dict(
    activation="relu",
    n_epochs=1,
    lr_warmup_steps=0,
    fit_encoder=False,
    sparse_start=False,
    beta1=0.9,
    loss="sum",
    max_norm_multiple=None,
    resample_every=0,
)

# Each entry: what differs from the defaults of TrainConfig and SAEConfig.
PRESETS: dict[str, dict[str, Any]] = {
    "saefast": {},
    "openai": _PEERS | dict(
        init="kaiming", b_dec_init="geometric_median", init_rows=32768, init_encoder_scale=True, normalize="none",
        max_norm_multiple=None, lr=1e-4, eps=6.25e-10, lr_decay_start=-1, loss="scaled_mse", auxk_k=256,
        auxk_scale_few_dead=False, auxk_b_dec_grad=True, dead_unit="steps", dead_after=76, dead_start=-1,
        fired_above=1e-3, decoder_norm="pre_step", ema_decay=0.999, batch_size=131072,
    ),
    "sparsify": _PEERS | dict(
        init="kaiming", b_dec_init="mean", normalize="none", lr_warmup_steps=1000, lr_warmup_from_zero=True,
        max_norm_multiple=None, lr_decay_start=0, loss="fvu", auxk_coef=0.0, auxk_denominator="inputs",
        dead_after=10_000_001, dead_update_first=False, fired_above=None, decoder_norm="pre_forward",
    ),
    "dictionary_learning": _PEERS | dict(
        init="tied", b_dec_init="geometric_median", normalize="none", lr_warmup_steps=1000, lr_warmup_from_zero=True,
        max_norm_multiple=None, lr_decay_start=-1, max_grad_norm=1.0, loss="sum", auxk_scale_few_dead=False,
        fired_above=None,
    ),
    "saelens": _PEERS | dict(
        init="tied_0.1", b_dec_init="zeros", normalize="none", rescale_acts_by_decoder_norm=True,
        unit_norm_decoder=False, max_norm_multiple=None, lr=3e-4, lr_decay_start=-1, max_grad_norm=1.0, loss="sum",
        auxk_coef=1.0, auxk_denominator="none", auxk_relu=False, dead_unit="steps", dead_after=1001,
        dead_update_first=False, decoder_norm="never", project_decoder_grad=False,
    ),
    # Bricken et al. 2023, with the penalty's weight of its largest SAE (`ReLU.recipe`). The learning rate is chosen.
    "towards_monosemanticity": _PAPERS | dict(
        init="kaiming", b_dec_init="geometric_median", normalize="none", batch_size=8192, lr_decay_start=-1,
        sparsity_warmup_share=0.0, resample="inputs", resample_steps=(25_000, 50_000, 75_000, 100_000),
        dead_unit="steps", dead_after=12_500,
    ),
    # Circuits Updates of April 2024, which Templeton et al. 2024 trained by.
    "scaling_monosemanticity": _PAPERS | dict(
        init="tied_0.1", b_dec_init="zeros", normalize="sqrt_d", batch_size=4096, lr=5e-5, lr_decay_share=0.2,
        max_grad_norm=1.0, apply_b_dec_to_input=False, unit_norm_decoder=False, decoder_norm="never",
        project_decoder_grad=False, sparsity_coef=5.0, sparsity_warmup_share=0.05, dead_after=10_000_000,
    ),
}  # fmt: skip


@typed
def preset(name: str, d_in: int, n_latents: int, k: int = 32, **overrides: Any) -> tuple[SAEConfig, TrainConfig]:
    """The SAEConfig and TrainConfig of a recipe: "saefast" (ours) or a peer's, see PRESETS.

    Keyword arguments override fields of either config.

    Raises:
        InputError: an unknown preset or field.
    """
    if name not in PRESETS:
        raise InputError(f"preset is {name!r}: expected one of {', '.join(PRESETS)}")
    values = PRESETS[name] | overrides
    sae_fields = {f.name for f in dataclasses.fields(SAEConfig)}
    sae_values = {key: value for key, value in values.items() if key in sae_fields}
    sae_config = SAEConfig.from_dict(dict(d_in=d_in, n_latents=n_latents, k=k) | sae_values)
    values = PRESETS[name] | sae_config.architecture().recipe(name) | overrides
    rest = {key: value for key, value in values.items() if key not in sae_fields}
    return sae_config, TrainConfig.from_dict(rest)
