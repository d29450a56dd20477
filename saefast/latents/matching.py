"""Which latents of two SAEs are alike, by the cosines of their decoder rows; the file that `matched.read` reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saefast import ambient
from saefast.errors import InputError
from saefast.files import replacing
from saefast.latents.matched import VERSION, Matched, path_of
from saefast.latents.products import ROWS, Products, unit_rows
from saefast.latents.steps import Advance, nothing

# Random rows that a control is made of: as many say to a third of a percent what share of them reaches a cosine.
CONTROL_ROWS = 1000


@ambient.plainly(grad=False)
def match(
    a: Tensor, b: Tensor, facts: Mapping[str, Any] | None = None, advance: Advance = nothing, seed: int = 0
) -> Matched:
    """The best match of every latent of each SAE in the other, and what matches random rows would have.

    Memory beside the decoders: their unit rows in fp32 and, of one at a time, bf16, and O(La + Lb).

    Args:
        a, b: decoders (La, d) and (Lb, d), of any float dtype, on one device. Rows of zeros match nothing.
        facts: for `Matched.facts`; `write` needs "a" and "b", the digests of the weights.
        advance: called with how many rows more are done, La + Lb + 2 · CONTROL_ROWS in all.
        seed: of the controls.

    Raises:
        InputError: decoders of different widths or devices, or with values that are not finite.
    """
    for name, decoder in (("a", a), ("b", b)):
        if decoder.dim() != 2:
            raise InputError(f"{name} has shape {tuple(decoder.shape)}: expected a decoder (n_latents, width)")
    if a.shape[1] != b.shape[1]:
        raise InputError(
            f"the SAEs write vectors of {a.shape[1]} and of {b.shape[1]} numbers: latents can be compared only between "
            "SAEs of the same hook, or of hooks of the same width"
        )
    if a.device != b.device:
        raise InputError(f"a is on {a.device}, b on {b.device}: move one with .to()")
    units_a, units_b = unit_rows(a, "a"), unit_rows(b, "b")
    a_best, a_cosine, a_control = _one_way(units_a, units_b, seed, advance)
    b_best, b_cosine, b_control = _one_way(units_b, units_a, seed + 1, advance)
    return Matched(a_best, a_cosine, b_best, b_cosine, a_control, b_control, dict(facts or {}))


def write(folder: str | Path, found: Matched) -> Path:
    """Writes the file into `folder`, whole or not at all; `matched.read` reads it.

    Raises:
        InputError: facts lack the digests.
        OSError: the folder cannot be written.
    """
    facts = found.facts | {"version": VERSION}
    if not (isinstance(facts.get("a"), str) and isinstance(facts.get("b"), str)):
        raise InputError("facts lack a or b: expected the digests of the weights of both SAEs")
    path = path_of(folder, facts["a"], facts["b"])
    arrays = {name: getattr(found, name) for name in Matched._fields if name != "facts"}
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
    return path


def _one_way(rows: Tensor, others: Tensor, seed: int, advance: Advance) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each unit row its best among the others, the cosine, and the sorted cosines of the control."""
    there = others.any(1).nonzero()[:, 0]
    others = others if len(there) == len(others) else others[there]
    products = Products(others) if len(there) else None
    best, cosine = _best(rows, products, there, advance)
    _, by_chance = _best(_random_rows(rows, seed), products, there, advance)
    return best.cpu().numpy(), cosine.cpu().numpy(), by_chance.sort().values.cpu().numpy()


def _best(rows: Tensor, products: Products | None, there: Tensor, advance: Advance) -> tuple[Tensor, Tensor]:
    best = torch.full((len(rows),), -1, dtype=torch.int32, device=rows.device)
    cosine = torch.zeros(len(rows), dtype=torch.float32, device=rows.device)
    for start in range(0, len(rows), ROWS):
        block = rows[start : start + ROWS]
        alive = block.any(1).nonzero()[:, 0]
        if products is not None and len(alive):
            values, ids = products.largest(block[alive], 1)
            best[start + alive] = there[ids[:, 0].long()].int()
            cosine[start + alive] = values[:, 0].clamp(-1, 1)
        advance(len(block))
    return best, cosine


def _random_rows(units: Tensor, seed: int) -> Tensor:
    """(CONTROL_ROWS, d) unit rows drawn from a normal distribution with the second moments of the unit rows.

    Sums of all rows with normal weights are just that, and no (d, d) matrix is needed.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    made = torch.zeros(CONTROL_ROWS, units.shape[1], dtype=torch.float32, device=units.device)
    for rows in units.split(ROWS):
        weights = torch.randn(CONTROL_ROWS, len(rows), generator=generator, dtype=torch.float32, device="cpu")
        made += weights.to(units.device) @ rows
    return unit_rows(made, "the control")
