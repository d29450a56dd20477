"""Reads which latents of two SAEs are alike, from the file that `matching.write` leaves beside latents.db.

Needs NumPy alone, so that a page is served without waiting for torch.
"""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from saefast.errors import InputError

# Of the file; another number is another meaning of its arrays.
VERSION = 1
# Decoder rows with a cosine from here on are taken for the same latent (Leask et al. 2025, arXiv 2502.04878).
ALIKE = 0.7

Side = Literal["a", "b"]


class Matched(NamedTuple):
    """Two SAEs, a and b, by their decoder rows.

    a_best, a_cosine: (La,) int32 and float32, for each latent of a the one of b with the largest cosine; -1 and 0 for
        a row of zeros, which has no direction. b_best, b_cosine: (Lb,) the other way around.
    a_control, b_control: float32, ascending, cosines of the same kind for random rows with the covariance of a's (b's)
        rows: what best cosines are reached without any latent in common.
    facts: "a" and "b", the digests of the weights, and what else the writer gave.
    """

    a_best: np.ndarray
    a_cosine: np.ndarray
    b_best: np.ndarray
    b_cosine: np.ndarray
    a_control: np.ndarray
    b_control: np.ndarray
    facts: dict[str, Any]

    def mutual(self, alike: float = ALIKE) -> np.ndarray:
        """(pairs, 2) int64: latents of a and b that are each other's best, with a cosine of at least `alike`; the most
        alike first."""
        a = np.flatnonzero((self.a_best >= 0) & (self.a_cosine >= alike))
        a = a[self.b_best[self.a_best[a]] == a]
        a = a[np.argsort(-self.a_cosine[a], kind="stable")]
        return np.stack([a, self.a_best[a]], axis=1).astype(np.int64)

    def only(self, side: Side, alike: float = ALIKE) -> np.ndarray:
        """(n,) int64: latents of one that the other has none like, cosine below `alike`; the least alike first."""
        best, cosine = self._of(side)
        ids = np.flatnonzero((best >= 0) & (cosine < alike))
        return ids[np.argsort(cosine[ids], kind="stable")].astype(np.int64)

    def histogram(self, side: Side, bins: int = 50) -> tuple[np.ndarray, np.ndarray]:
        """Latents, and control rows, by best cosine: two (bins,) int64, of equal width from 0 to 1.

        Cosines below 0 count as 0; rows of zeros are not counted.
        """
        best, cosine = self._of(side)
        control = self.a_control if side == "a" else self.b_control
        found = (np.histogram(np.clip(c, 0, 1), bins, (0.0, 1.0))[0] for c in (cosine[best >= 0], control))
        counts, by_chance = (c.astype(np.int64) for c in found)
        return counts, by_chance

    def _of(self, side: Side) -> tuple[np.ndarray, np.ndarray]:
        return (self.a_best, self.a_cosine) if side == "a" else (self.b_best, self.b_cosine)


_ARRAYS = {"a_best": "<i4", "a_cosine": "<f4", "b_best": "<i4", "b_cosine": "<f4", "a_control": "<f4"}
_ARRAYS["b_control"] = "<f4"


def path_of(folder: str | Path, a: str, b: str) -> Path:
    """The file in `folder` (that of a's latents.db) for two SAEs, by the digests of their weights."""
    return Path(folder) / f"match-{_short(a)}-{_short(b)}.npz"


def read(path: str | Path) -> Matched:
    """The file that `matching.write` made.

    Raises:
        InputError: it is not there, damaged, of another version, or another program's.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no {path}: the two SAEs have not been compared")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            facts = json.loads(bytes(arrays["facts"]))
            version = facts["version"]
            columns = {name: arrays[name] for name in _ARRAYS} if version == VERSION else {}
    except Exception as error:  # of an altered zip file, zipfile and NumPy raise a dozen kinds
        raise InputError(f"{path} is damaged, or no such file ({error}): delete it, and it is made anew") from None
    if version != VERSION:
        raise InputError(f"{path} is version {version}: expected {VERSION}; delete it, and it is made anew")
    found = Matched(**columns, facts=facts)
    _check(found, path)
    return found


def _check(found: Matched, path: Path) -> None:
    """Raises InputError where arrays do not go together, so that no id leads past an end."""
    sound = all(getattr(found, name).dtype == kind and getattr(found, name).ndim == 1 for name, kind in _ARRAYS.items())
    for best, cosine, n in (
        (found.a_best, found.a_cosine, len(found.b_best)),
        (found.b_best, found.b_cosine, len(found.a_best)),
    ):
        sound = sound and len(best) == len(cosine) and bool(np.all((best >= -1) & (best < n)))
    if not sound:
        raise InputError(f"{path} is damaged: its arrays do not go together; delete it, and it is made anew")


def _short(digest: str) -> str:
    kept = "".join(c for c in digest if c.isalnum())[:16]
    if not kept:
        raise InputError(f"{digest!r} is no digest of weights: expected hexadecimal digits")
    return kept
