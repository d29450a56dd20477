"""Matryoshka: nested dictionaries, each of which reconstructs the input (Bussmann et al. 2025, arXiv 2503.17547).

The first latents of the dictionary have to do with what the later ones only refine, so that general features are not
split into special ones.
"""

from dataclasses import dataclass
from typing import Any, Literal

from saefast.errors import InputError
from saefast.models.architecture import At, Layer, Term, Terms


@dataclass
class MatryoshkaFields:
    """What a Matryoshka SAE is.

    Attributes:
        matryoshka: sizes of nested dictionaries, ascending; each reconstructs the input from its own latents, the whole
            dictionary last. None is one dictionary.
    """

    matryoshka: tuple[int, ...] | None = None

    def check(self) -> None:
        widths = self.matryoshka
        if widths is not None and (not widths or any(a >= b for a, b in zip((0, *widths), widths, strict=False))):
            raise InputError(
                f"matryoshka is {widths}: expected ascending sizes of at least 1, such as (512, 2048, 8192)"
            )


@dataclass
class MatryoshkaTraining:
    """How a Matryoshka SAE is trained.

    Attributes:
        matryoshka_loss: how the losses of nested dictionaries add up: "sum" (the paper, SAELens), or "weighted_mean",
            the mean over the G of them of each one's loss over G (dictionary_learning: divided by G twice).
    """

    matryoshka_loss: Literal["sum", "weighted_mean"] = "sum"

    def check(self) -> None:
        """Any of the two will do."""


class Matryoshka(Layer):
    """Terms for every nested dictionary, over any activation; the whole dictionary is what is served."""

    Fields = MatryoshkaFields
    TrainFields = MatryoshkaTraining
    presets = {"dictionary_learning": dict(matryoshka_loss="weighted_mean")}  # noqa: RUF012

    @classmethod
    def wanted(cls, config: Any) -> bool:
        return config.matryoshka is not None

    def check(self) -> None:
        super().check()
        if self.config.matryoshka[-1] > self.config.n_latents:
            raise InputError(
                f"matryoshka is {self.config.matryoshka}, but n_latents only {self.config.n_latents}: expected sizes "
                "up to that"
            )

    def check_training(self, train: Any) -> None:
        super().check_training(train)
        if train.multi_topk_coef:
            raise InputError(
                f"multi_topk_coef is {train.multi_topk_coef}, which a Matryoshka SAE has not: its terms are nested "
                "dictionaries; set it to 0"
            )

    def widths(self) -> tuple[int, ...]:
        """Sizes of all nested dictionaries, the whole one last."""
        given, L = self.config.matryoshka, self.config.n_latents
        return given if given[-1] == L else (*given, L)

    def terms(self, train: Any, at: At) -> Terms:
        widths = self.widths()
        weight = 1.0 if train.matryoshka_loss == "sum" else len(widths) ** -2
        return Terms(tuple(Term(width, weight) for width in widths), by_latent=True, main=len(widths) - 1)
