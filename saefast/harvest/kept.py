"""Which tokens' rows are kept: by what the token is and where it stands, and by the row itself."""

import numbers
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saefast.errors import InputError

# Why tokens are left out. Indices that were written before some reason existed lack it.
DROPPED = ("special", "excluded", "padding", "not_finite", "outlier_norm")
# "auto": a norm this many times the median one is an outlier (dictionary_learning's max_activation_norm_multiple).
FAR = 10.0
# Tokens from the beginning of the text whose median norm is that of the whole harvest.
NORM_TOKENS = 1 << 14


@dataclass(frozen=True)
class TokenChoice:
    """Which tokens a harvest keeps rows of.

    Attributes:
        special: ids (n,) int64 of special tokens; keep_special: whether they have rows nevertheless.
        excluded: ids (n,) int64 that have none anywhere.
        drop_first: so many tokens at the beginning of a sequence, after its leading special ones, have none either.
    """

    special: np.ndarray
    excluded: np.ndarray
    keep_special: bool = False
    drop_first: int = 0

    @classmethod
    def from_index(cls, index: Mapping[str, Any], special: Sequence[int] = ()) -> "TokenChoice":
        """What a harvest's index.json says; `special` where it was written before special_ids were kept in it."""
        settings = index.get("settings", {})
        ids = (index.get("special_ids", special), index.get("excluded_ids", ()))
        special_ids, excluded = (np.array(sorted(found), dtype=np.int64) for found in ids)
        return cls(special_ids, excluded, bool(settings.get("keep_special_tokens")), int(settings.get("drop_first", 0)))

    def facts(self) -> dict[str, Any]:
        """What index.json keeps beside the settings."""
        return {"special_ids": self.special.tolist(), "excluded_ids": self.excluded.tolist()}

    def __call__(self, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For token ids and mask (sequences, length): where special tokens are left out, and where others too (kept).

        Both bool of that shape, True where a row stays.
        """
        special = mask & np.isin(ids, self.special)
        text = mask if self.keep_special else mask & ~special
        kept = text & ~np.isin(ids, self.excluded)
        if self.drop_first:
            leading = special.cumprod(1).sum(1, keepdims=True)
            place = np.arange(ids.shape[1]) - leading
            kept &= (place < 0) | (place >= self.drop_first)
        return text, kept


def token_ids(tokenizer: Any, tokens: Sequence[int | str]) -> list[int]:
    """The ids of tokens given by id, by their name in the vocabulary, or as the text that is one token.

    Raises:
        InputError: an id beyond the vocabulary, or text that is not one token, naming what it is split into.
    """
    return sorted({_token_id(tokenizer, token) for token in tokens})


def _token_id(tokenizer: Any, token: int | str) -> int:
    if isinstance(token, numbers.Integral):
        if not 0 <= token < len(tokenizer):
            raise InputError(f"exclude_tokens names {token}: expected ids of tokens, 0 to {len(tokenizer) - 1}")
        return int(token)
    vocabulary = tokenizer.get_vocab()
    if token in vocabulary:
        return int(vocabulary[token])
    ids = list(tokenizer(token, add_special_tokens=False)["input_ids"])
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return int(ids[0])
    parts = " ".join(repr(str(tokenizer.convert_ids_to_tokens(part))) for part in ids) or "nothing"
    raise InputError(
        f"exclude_tokens names {token!r}, which is no token of this tokenizer but {parts}: name a token, or its id"
    )


class Overflow(NamedTuple):
    """The first row of a batch that is not finite: at what hook, whether only in the dtype it is stored in, and the
    row's number in the batch."""

    hook: str
    stored: bool
    row: int


def finite_rows(rows: Mapping[str, Tensor], stored: torch.dtype | None) -> tuple[Tensor, Overflow | None]:
    """Which rows (n,) bool, on the CPU, are finite at every hook, also once they are cast to `stored` (None: as is)."""
    finite, first = torch.ones(len(next(iter(rows.values()))), dtype=torch.bool, device="cpu"), None
    for hook, values in rows.items():
        low, high = values.aminmax(dim=1)
        # Rounding keeps the order of numbers: where the largest stays finite, all do.
        largest = torch.maximum(-low, high)
        fine = largest.isfinite() if stored is None else largest.to(stored).isfinite()
        fine = fine.cpu()
        if first is None and not bool(fine.all()):
            row = int((~fine).nonzero()[0])
            first = Overflow(hook, bool(largest[row].isfinite()), row)
        finite &= fine
    return finite, first


def say_overflow(overflow: Overflow, where: str, model_dtype: str | None, stored: torch.dtype | None) -> None:
    """One warning about rows that were not finite, with what to do."""
    if overflow.stored:
        kind = str(stored).removeprefix("torch.")
        why = f"has values beyond what {kind} holds"
        advice = f"store rows in {'float32' if kind == 'bfloat16' else 'bfloat16 or float32'} (dtype) to keep such rows"
    else:
        why = f"gives NaN or inf in {model_dtype}"
        half = model_dtype == "float16"
        advice = "run the model in bfloat16 or float32 (forward)" if half else "look at the model's weights and output"
    warnings.warn(
        f"hook {overflow.hook!r} {why} (first at {where}): such rows are dropped and counted as not_finite; {advice}",
        RuntimeWarning,
        stacklevel=2,
    )


def ordinary_norms(rows: Mapping[str, Tensor], limits: Mapping[str, float]) -> Tensor:
    """Which rows (n,) bool, on the CPU, have at every hook a norm of at most its limit."""
    return torch.stack([(norms_of(values) <= limits[hook]).cpu() for hook, values in rows.items()]).all(0)


def norms_of(rows: Tensor) -> Tensor:
    """Norms (n,) float32 of rows (n, d)."""
    return rows.float().norm(dim=1)


def multiple_of(max_norm_multiple: float | Literal["auto"]) -> float:
    """The number that HarvestConfig.max_norm_multiple means."""
    return FAR if max_norm_multiple == "auto" else float(max_norm_multiple)


class FirstPositions:
    """Looks for attention sinks at the beginning of sequences, in the first NORM_TOKENS rows of a harvest."""

    def __init__(self) -> None:
        self._norms: dict[str, list[Tensor]] = {}
        self._pos: list[Tensor] = []
        self._n_rows = 0

    def see(self, rows: Mapping[str, Tensor], pos: Tensor) -> bool:
        """Takes in rows with their positions (n,). -> Whether it has seen enough."""
        for hook, values in rows.items():
            self._norms.setdefault(hook, []).append(norms_of(values).cpu())
        self._pos.append(pos)
        self._n_rows += len(pos)
        return self._n_rows >= NORM_TOKENS

    def say(self) -> None:
        """A warning where the first position has norms beyond FAR times the median of all."""
        first = torch.cat(self._pos) == 0 if self._pos else torch.zeros(0, dtype=torch.bool, device="cpu")
        if not bool(first.any()):
            return
        for hook, parts in self._norms.items():
            norms = torch.cat(parts)
            times = float(norms[first].median() / norms.median())
            if times > FAR:
                warnings.warn(
                    f"hook {hook!r}: at position 0 rows have {times:.0f} times the median norm (an attention sink, for "
                    "no BOS stands there): leave them out with drop_first=1 or max_norm_multiple='auto', or give the "
                    "model its BOS with prepend_bos=True",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return
