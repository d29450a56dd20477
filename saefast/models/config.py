"""SAEConfig: what an SAE is."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import torch

from saefast.errors import InputError
from saefast.models import registry
from saefast.models.architecture import Architecture
from saefast.models.init import Init
from saefast.schema import check, check_fields

DType = Literal["float32", "bfloat16", "float16", "float64"]
DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

if TYPE_CHECKING:
    # What a type checker cannot read: fields and names that architectures bring along.
    Activation = str
    ArchitectureFields: Any = object
else:
    Activation = Literal[tuple(registry.ACTIVATIONS)]
    ArchitectureFields = registry.fields("Fields")


@dataclass
class SAEConfig(ArchitectureFields):
    """What an SAE is; how it is trained stands in TrainConfig.

    Attributes:
        d_in: width of the activations.
        n_latents: dictionary size (SAELens calls it d_sae).
        k: latents active per token.
        activation: how a token's latents are chosen; see `saefast.models.registry`.
        apply_b_dec_to_input: encode x - b_dec rather than x; False wherever the target is another than x, for b_dec is
            the centre of targets.
        unit_norm_decoder: training keeps decoder rows at unit norm; False leaves them free.
        rescale_acts_by_decoder_norm: activations are measured in units of the decoder row's norm (SAELens).
        init: how weights begin; see `saefast.models.init.init_weights`.
        dtype: of the weights.
        metadata: free facts that travel with the SAE: model_name, hook_name, ...
    """

    d_in: int
    n_latents: int
    k: int = 32
    activation: Activation = "topk"
    apply_b_dec_to_input: bool = True
    unit_norm_decoder: bool = True
    rescale_acts_by_decoder_norm: bool = False
    init: Init = "rows"
    dtype: DType = "float32"
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tuples_from_lists(self)
        check_fields(self)
        for name in ("d_in", "n_latents", "k"):
            if not 1 <= getattr(self, name) < 2**31:  # ids of latents are int32
                raise InputError(f"{name} is {getattr(self, name)}: expected at least 1 and less than 2^31")
        if self.k > self.n_latents:
            raise InputError(f"k is {self.k} but n_latents only {self.n_latents}: k <= n_latents is needed; lower k")
        registry.check("Fields", self)
        architecture = self.architecture()
        architecture.check()
        if architecture.has_target:
            self.apply_b_dec_to_input = False
        try:
            json.dumps(self.metadata)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"metadata cannot be written as JSON ({error}): keep to numbers, strings and lists"
            ) from None

    @property
    def d_sae(self) -> int:
        """SAELens' name for n_latents."""
        return self.n_latents

    def architecture(self) -> Architecture:
        """What this describes: the rules of `activation`, and what lies over it."""
        return registry.architecture(self)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SAEConfig":
        """From to_dict()'s output; d_sae is taken for n_latents. Unknown keys raise InputError."""
        values = dict(check(values, dict[str, Any], "SAE config"))
        if "d_sae" in values:
            values["n_latents"] = values.pop("d_sae")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InputError(f"SAE config has unknown keys {unknown}: expected some of {sorted(known)}")
        if missing := [name for name in ("d_in", "n_latents") if name not in values]:
            raise InputError(f"SAE config lacks {missing}: add them")
        return cls(**values)


SAEConfig.__doc__ = f"{str(SAEConfig.__doc__).rstrip()}\n{registry.described('Fields')}    "


def tuples_from_lists(config: Any) -> None:
    """Makes tuples of a config's lists where a tuple is declared: JSON has only lists."""
    for name, declared in get_type_hints(type(config)).items():
        if "tuple" in str(declared) and isinstance(value := getattr(config, name), list):
            setattr(config, name, tuple(value))
