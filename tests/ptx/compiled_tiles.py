"""The encoder's tile kernels on tensor-core code: every checked-in setting of sm_80 and sm_90 against float64.

mma.sync, ldmatrix and cp.async of sm_80; wgmma, TMA and mbarriers of sm_90, with fewer programs than tiles. On integer
data, whose products are exact in any order, with ragged edges, a NaN and many steps through each ring of buffers.
Triton's own interpreter can run none of this in bf16.
"""

from typing import Any

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ptx.emulate import emulated
from saefast.kernels import encode_tiles, tuning

B, N, L, D, STRIDE, EMPTY = 150, 70, 200, 352, 256, -777.0
DTYPES = {"half": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}


def settings() -> list[Any]:
    """(sm, kind, setting, options) of all that tuning has for tensor cores, and each option of a launch once."""
    found = []
    for sm in (80, 90):
        for kind in ("half", "tf32"):
            found += [(sm, kind, config, {}) for config in dict.fromkeys(tuning.TILES[sm, kind])]
            found.append((sm, kind, tuning.pointer_tiles(sm, kind, 768), dict(latents=True)))
        narrow, wide = tuning.TILES[sm, "half"]
        found += [(sm, "fp16", narrow, {}), (sm, "half", wide, dict(group=64))]
        lean = tuning.tiles(sm, "half", 4096, plain=False)
        found += [(sm, "half", lean, dict(scale=True)), (sm, "half", lean, dict(count=True))]
    return [pytest.param(*case, id=f"{case[0]} {case[1]} {tuple(case[2])} {list(case[3])}") for case in found]


def problem(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, W = (torch.randint(-8, 9, (rows, D)).to(DTYPES[kind]) for rows in (B, L))
    x[3, 5] = torch.nan
    return x, W


def launch(kernel: Any, grid: tuple[int, ...], config: tuning.Tiles, **given: Any) -> None:
    """By name, and None for what is not given."""
    sizes = dict(BLOCK_B=config.block_b, BLOCK_L=config.block_l, BLOCK_D=config.block_d)
    arguments = {p.name: (given | sizes).get(p.name) for p in kernel.params}
    kernel[grid](**arguments, num_warps=config.warps, num_stages=config.stages)


@pytest.mark.parametrize(("sm", "kind", "config", "options"), settings())
def test_exact_on_integers(sm: int, kind: str, config: tuning.Tiles, options: dict[str, Any]) -> None:
    x, W = problem(kind)
    group, count = options.get("group", 32), "count" in options
    latents = torch.randperm(L)[:N].int() if "latents" in options else None
    scratch = torch.full((B, STRIDE), EMPTY)
    groups = torch.zeros((B, STRIDE // group), dtype=torch.int32 if count else torch.float32)
    numbers = dict(B=B, n=N, start=0, D=D, stride=STRIDE, threshold_step=0, span=1)
    vectors = dict(
        bias_ptr=torch.zeros(L), scale_ptr=torch.ones(L) if "scale" in options else None, groups_ptr=groups,
        threshold_ptr=torch.full((STRIDE,), 30.0 if count else torch.nan), scratch_ptr=scratch,
    )  # fmt: skip
    tiles = -(-B // config.block_b) * -(-N // config.block_l)
    how = dict(GROUP=group, COUNT=count, PRECISION="tf32" if kind == "tf32" else "ieee")
    with emulated(sm) as found:
        if config.per_sm and latents is None:
            boxes = [TensorDescriptor.from_tensor(x, [config.block_b, config.block_d])]
            boxes.append(TensorDescriptor.from_tensor(W, [config.block_l, config.block_d]))
            operands = dict(x_desc=boxes[0], W_desc=boxes[1], FENCE=True)
            # A persistent grid: fewer programs than tiles.
            launch(encode_tiles.tiles_descriptor, (max(1, tiles - 1),), config, **operands, **vectors, **numbers, **how)
        else:
            operands = dict(x_ptr=x, W_ptr=W, latents_ptr=latents)
            launch(encode_tiles.tiles_pointer, (tiles,), config, **operands, **vectors, **numbers, **how)
    assert not found.faults, found.faults
    wanted = x.double() @ (W[:N] if latents is None else W[latents.long()]).double().T
    got = scratch[:, :N].double()
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    # With COUNT, groups without a hit are not stored.
    assert (same | (got == EMPTY) if count else same).all()
    assert not (got == EMPTY).all()
    hits = ~(wanted[:, : N // group * group] <= 30)
    if count:
        assert torch.equal(groups[:, : N // group].long(), hits.reshape(B, -1, group).sum(2))
