"""What bench/steering.py compares with, and the figures of it that docs/pipelines.md shows."""

import json
import re
from typing import Any

import pytest
import served
import tiny_models
import torch
from torch import Tensor

import saefast
from bench import common, steering
from saefast.integrations.steering import Steering

IDS = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(3))


def at_block(model: Any, block: Any) -> Tensor:
    """What block 1 gives, behind what the blocks around it do."""
    with torch.no_grad(), block, saefast.encode(model, {"layers.2:in": served.sae("relu", d_in=16, dtype="float32")}):
        seen: list[Tensor] = []
        handle = model.get_submodule("model.layers.2").register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        model(IDS)
        handle.remove()
    return seen[0]


def test_random_directions_move_every_token_as_far() -> None:
    model = tiny_models.model("llama", head=True)
    sae = served.sae("topk", d_in=16, dtype="float32", metadata={"hook_name": "layers.1"}).requires_grad_(False)
    before = at_block(model, saefast.encode(model, sae))
    steered = at_block(model, saefast.steer(model, sae, {3: 4.0}))
    drawn = at_block(model, steering.random_direction(model, Steering(sae, {3: 4.0}), 5))
    torch.testing.assert_close((drawn - before).norm(dim=-1), (steered - before).norm(dim=-1), rtol=1e-4, atol=1e-5)
    directions = torch.nn.functional.normalize((drawn - before).flatten(0, 1), dim=1)
    assert float((directions @ directions.T).min()) > 0.99
    assert float((steered - before).norm()) > 1


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_the_long_way_has_the_latent_at_the_value_everywhere(kind: str) -> None:
    sae = served.sae(kind)
    x = served.rows(sae, 2, 30)
    found = sae.decode_sparse(*steering.changed(3, 4.0)(*sae.encode_sparse(x)))
    expected = sae.encode(x)
    expected[..., 3] = 4.0
    torch.testing.assert_close(found, sae.decode(expected), rtol=1e-12, atol=1e-12)


def test_the_page_shows_what_was_measured() -> None:
    kept = json.loads((common.RESULTS / "amd-epyc-x1-steering.json").read_text(encoding="utf-8"))["results"]
    page = (common.ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
    section = page.partition("\n## On a real model\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    shown = {row[0]: row[1:] for row in rows}
    for row in kept["how far"]:
        figures = [f"{row[name]:.1%}" for name in ("latent", "random")]
        assert shown[f"{row['times the largest activation']:g}"] == [
            *figures,
            f"{row['better than random']} of {row['of latents']}",
        ]
    for way, ms in kept["cost"].items():
        assert shown[way] == [f"{ms:.1f}"]
    (off,) = re.findall(r"logits differ by (\S+) of their largest", section)
    assert float(off) >= kept["exact"]["off"]
    assert f"{kept['sizes']['tokens']:,} tokens" in section
