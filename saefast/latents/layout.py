"""A map of latents: their decoder rows in two dimensions, in clusters that have names.

UMAP (McInnes et al. 2018, arXiv 1802.03426) of the neighbours that are known already, where umap-learn is installed,
begun at the principal components (Kobak and Linderman 2021); these alone where it is not.
"""

import importlib.metadata
import math
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saefast import ambient
from saefast.errors import InputError
from saefast.latents.products import ROWS, unit_rows
from saefast.ops.encode_topk import encode_topk

# Fewer rows than this have no neighbourhoods to speak of.
_LEAST_FOR_UMAP = 100
# Clusters, at most as many as can be told apart on a map.
_IN_A_CLUSTER, _MOST_CLUSTERS = 32, 64
_ROUNDS = 25
# Rows that the first centres are drawn from.
_SAMPLE = 4096


class Layout(NamedTuple):
    """points: (L, 2) float32 in about -1 to 1; rows of zeros, which have no direction, in a line below all others.

    cluster: (L,) int16, the largest is 0, -1 for rows of zeros. n_clusters. method: what the points are. variance: the
    share of all variance that the two directions of a PCA hold, None for UMAP.
    """

    points: np.ndarray
    cluster: np.ndarray
    n_clusters: int
    method: Literal["umap", "pca"]
    variance: float | None


@ambient.plainly(grad=False)
def layout(decoder: Tensor, neighbour_ids: Tensor, neighbour_cosines: Tensor, seed: int = 0) -> Layout:
    """Points and clusters of decoder rows, by their directions alone; the same on every call with the same libraries.

    Memory beside the decoder: its unit rows in fp32, O(L · n), and a (d, d) matrix.

    Args:
        decoder: (L, d) of any float dtype.
        neighbour_ids, neighbour_cosines: (L, n), as `neighbours.neighbours` gives them.

    Raises:
        InputError: neighbours that are not of this decoder; values that are not finite.
    """
    if neighbour_ids.shape != neighbour_cosines.shape or neighbour_ids.shape[:1] != decoder.shape[:1]:
        raise InputError(
            f"neighbour_ids has shape {tuple(neighbour_ids.shape)} and neighbour_cosines "
            f"{tuple(neighbour_cosines.shape)}: expected (n_latents = {len(decoder)}, n) both"
        )
    units = unit_rows(decoder, "decoder")
    alive = units.any(1).nonzero()[:, 0]
    units, there = units[alive], alive.cpu().numpy()
    points, held = principal(units)
    variance: float | None = held
    method: Literal["umap", "pca"] = "pca"
    if len(there) >= _LEAST_FOR_UMAP and _umap_installed():
        ids, cosines = neighbour_ids[alive].cpu().numpy(), neighbour_cosines[alive].cpu().numpy()
        found = _umap(points, _renumbered(ids, there, len(decoder)), cosines, seed)
        if found is not None:
            points, method, variance = found, "umap", None
    placed = np.empty((len(decoder), 2), np.float32)
    placed[there] = squared(points)
    dead = np.setdiff1d(np.arange(len(decoder)), there)
    placed[dead] = np.stack([np.linspace(-1, 1, len(dead) + 2)[1:-1], np.full(len(dead), -1.35)], axis=1)
    cluster = np.full(len(decoder), -1, np.int16)
    cluster[there], n_clusters = clusters(units, seed)
    return Layout(placed, cluster, n_clusters, method, variance)


def principal(units: Tensor) -> tuple[np.ndarray, float]:
    """(L, 2) float32, rows seen from their mean along the two directions of most variance, and the share they hold.

    Signs are such that a direction's largest entry is positive.
    """
    d = units.shape[1]
    if not len(units) or not d:
        return np.zeros((len(units), 2), np.float32), 0.0
    mean = units.mean(0)
    covariance = torch.zeros(d, d, dtype=torch.float32, device=units.device)
    for block in units.split(ROWS):
        moved = block - mean
        covariance.addmm_(moved.T, moved)
    # Where all directions hold about as much, searching for two of them one step at a time would not end.
    directions = torch.linalg.eigh(covariance).eigenvectors[:, -2:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = directions * torch.where(largest < 0, -1.0, 1.0)
    points = torch.cat([(block - mean) @ directions for block in units.split(ROWS)])
    total = sum(float((block - mean).square().sum(dtype=torch.float64)) for block in units.split(ROWS))
    held = float(points.square().sum(dtype=torch.float64)) / total if total > 0 else 0.0
    return np.pad(points.cpu().numpy(), ((0, 0), (0, 2 - points.shape[1]))), min(held, 1.0)


def squared(points: np.ndarray) -> np.ndarray:
    """(L, 2) float32: points moved and scaled alike in both directions, to -1 to 1.

    Where a few lie half as far out again as 98 % of all do, they are drawn in to 1.25 at most, in their order, so that
    they do not make all others a dot.
    """
    if not len(points):
        return points.astype(np.float32)
    points = points.astype(np.float64)
    low, high = np.quantile(points, [0.01, 0.99], axis=0)
    moved = points - (low + high) / 2
    unit = min(1.5 * float((high - low).max()) / 2, float(np.abs(moved).max()))
    moved = moved / unit if unit > 0 else np.zeros_like(moved)
    far = np.maximum(np.abs(moved), 1)
    return np.where(far > 1, np.sign(moved) * (1.25 - 0.25 / far), moved).astype(np.float32)


def clusters(units: Tensor, seed: int = 0) -> tuple[np.ndarray, int]:
    """Spherical k-means of unit rows (Dhillon and Modha 2001), each row with the centre of the largest cosine.

    Begun as k-means++ (Arthur and Vassilvitskii 2007) on a sample.

    Returns:
        (L,) int16, from the largest cluster to the smallest, and how many there are; none is empty.
    """
    if not len(units):
        return np.zeros(0, np.int16), 0
    n = how_many(len(units))
    generator = torch.Generator("cpu").manual_seed(seed)
    centres = _first_centres(units, n, generator)
    before = None
    for _ in range(_ROUNDS):
        sums, nearest = _gathered(units, centres)
        if before is not None and torch.equal(nearest, before):
            break
        before = nearest
        # A centre that no row is nearest to stays where it is.
        centres = torch.where(sums.any(1, keepdim=True), unit_rows(sums, "centres"), centres)
    found, numbers = np.unique(nearest.cpu().numpy(), return_inverse=True)
    sizes = np.bincount(numbers)
    place = np.empty(len(found), np.int16)
    place[np.argsort(-sizes, kind="stable")] = np.arange(len(found))
    return place[numbers], len(found)


def how_many(n_latents: int) -> int:
    """How many clusters: √(L / 32), from 1 to 64."""
    return min(_MOST_CLUSTERS, max(1, round(math.sqrt(n_latents / _IN_A_CLUSTER))))


def _first_centres(units: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """(n, d) rows drawn one after the other, the likelier the less they are like those before."""
    order = torch.randperm(len(units), generator=generator, dtype=torch.int64, device="cpu")[:_SAMPLE]
    sample = units[order.to(units.device)]
    chosen = [0]
    unlike = torch.full((len(sample),), 2.0, dtype=torch.float32, device=units.device)
    while len(chosen) < n:
        unlike = torch.minimum(unlike, (1 - sample @ sample[chosen[-1]]).clamp_min(0))
        # Where all rows are alike, any is as good.
        chance = unlike.cpu() if bool(unlike.any()) else torch.ones_like(unlike, device="cpu")
        chosen.append(int(torch.multinomial(chance, 1, generator=generator)))
    return sample[chosen].clone()


def _gathered(units: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the rows nearest to each centre (n, d), and the nearest centre of each row (L,)."""
    sums, nearest = torch.zeros_like(centres), []
    for block in units.split(ROWS):
        idx = encode_topk(block, centres, None, 1, relu=False)[1][:, 0].long()
        mine = torch.nn.functional.one_hot(idx, len(centres)).to(block.dtype)
        sums += mine.T @ block
        nearest.append(idx)
    return sums, torch.cat(nearest)


def _umap_installed() -> bool:
    # By the name of the package, since another one has a module called umap as well.
    try:
        importlib.metadata.distribution("umap-learn")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _renumbered(ids: np.ndarray, there: np.ndarray, n_latents: int) -> np.ndarray:
    """Ids of latents as places among those that are there; -1 stays."""
    place = np.full(n_latents + 1, -1, np.int64)
    place[there] = np.arange(len(there))
    return place[ids]


def _umap(start: np.ndarray, ids: np.ndarray, cosines: np.ndarray, seed: int) -> np.ndarray | None:
    """(L, 2) points of rows that have neighbours ids (L, n); None where umap-learn does not work here."""
    try:
        from umap import UMAP
    except Exception as error:  # numba raises what it likes for a NumPy that it does not know
        warnings.warn(
            f"the map of latents is a PCA: umap-learn is installed but cannot be used ({_first_line(error)})",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    # It counts a row as its own first neighbour.
    ids = np.concatenate([np.arange(len(ids))[:, None], ids], axis=1)
    distances = np.pad(np.clip(1 - cosines, 0, None), ((0, 0), (1, 0))).astype(np.float32)
    spread = float(np.abs(start).max()) or 1.0
    with warnings.catch_warnings():
        # About a search index for new data, and one thread for a fixed seed: both as they are meant here.
        warnings.simplefilter("ignore")
        made = UMAP(
            n_neighbors=ids.shape[1], init=10 * start / spread, random_state=seed, precomputed_knn=(ids, distances)
        ).fit_transform(start)
    # A row that nothing leads to is left where UMAP has no place for it.
    return np.where(np.isfinite(made), made, 0)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def cluster_names(
    cluster: np.ndarray,
    latents: np.ndarray,
    tokens: np.ndarray,
    shares: np.ndarray,
    text: Callable[[int], str],
    words: int = 3,
) -> list[str]:
    """A short name of each cluster: the words that its latents respond to more than others do, "" where there are none.

    A word weighs what share of a latent's activation falls on it, on average over the cluster's latents, times the
    logarithm of how many times that is of what it is over all: what it adds to the relative entropy of the two.

    Args:
        cluster: (L,) as in `Layout`.
        latents, tokens, shares: (n,) each, the latents' own tokens with their share of the activation.
        text: of a token. Texts that differ in case and spaces alone are one word.
        words: how many a name has at most, joined by " · ".
    """
    n_clusters = int(cluster.max(initial=-1)) + 1
    of = cluster[latents].astype(np.int64)
    kept = of >= 0
    of, tokens, shares = of[kept], tokens[kept], shares[kept].astype(np.float64)
    known, place = np.unique(tokens, return_inverse=True)
    texts = [text(int(token)).strip() for token in known]
    spelled, word = np.unique([each.lower() for each in texts] or np.zeros(0, str), return_inverse=True)
    shown = _most_common(texts, word, np.bincount(place, shares, len(known)), len(spelled))
    pairs, pair = np.unique(of * max(len(spelled), 1) + word[place], return_inverse=True)
    weight = np.bincount(pair, shares, len(pairs))
    where, which = pairs // max(len(spelled), 1), pairs % max(len(spelled), 1)
    sizes = np.bincount(cluster[cluster >= 0].astype(np.int64), minlength=n_clusters)
    over_all = np.bincount(which, weight, len(spelled)) / max(int(sizes.sum()), 1)
    mean = weight / sizes[where]
    score = mean * np.log(mean / over_all[which])
    names: list[list[str]] = [[] for _ in range(n_clusters)]
    # Where there is one cluster alone, no word is more its own than another's.
    for i in np.lexsort((which, -mean if n_clusters == 1 else -score)).tolist():
        if len(names[where[i]]) < words and shown[which[i]] and (score[i] > 0 or n_clusters == 1):
            names[where[i]].append(shown[which[i]])
    return [" · ".join(name) for name in names]


def _most_common(texts: list[str], word: np.ndarray, weight: np.ndarray, n_words: int) -> list[str]:
    """Of each word, the spelling with the most weight."""
    shown = [""] * n_words
    for i in np.argsort(weight, kind="stable").tolist():
        shown[word[i]] = texts[i]
    return shown
