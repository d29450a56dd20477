"""docs/ops.md says what the code does: its table of functions, its examples, its dtypes."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from saefast import ops

PAGE = (Path(__file__).parents[2] / "docs" / "ops.md").read_text(encoding="utf-8")


def names() -> dict[str, Any]:
    """What the page's Python defines."""
    found: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S):
        exec(block, found)
    return found


def rows() -> dict[str, tuple[list[str], list[str]]]:
    """Function -> its arguments and what it has derivatives to, as the table says."""
    found = re.findall(r"^\| `(\w+)\((.*?)\)` \|.*\| (.*?) \|$", PAGE, re.M)
    return {name: (arguments.split(", "), to.split(", ")) for name, arguments, to in found}


def test_the_table_has_every_function_with_its_arguments() -> None:
    assert set(rows()) == set(ops.__all__)
    for name, (arguments, _) in rows().items():
        parameters = inspect.signature(getattr(ops, name)).parameters
        assert list(parameters)[: len(arguments)] == arguments
        # What the table leaves out may be left out.
        assert all(p.default is not p.empty for p in list(parameters.values())[len(arguments) :]), name


def example(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """An argument for every name in the table."""
    idx = torch.stack([torch.randperm(24)[:3] for _ in range(5)])
    floats = {name: torch.randn(shape, dtype=dtype) for name, shape in SHAPES.items()}
    return floats | {"idx": idx, "k": 4, "n_latents": 24, "threshold": 0.5}


SHAPES = {"x": (5, 6), "W_enc": (24, 6), "b_enc": (24,), "W": (24, 6), "acts": (5, 3)}


def floats(found: Any) -> list[torch.Tensor]:
    """Of what an op returns: its one tensor of floats."""
    several = [found] if isinstance(found, torch.Tensor) else [t for t in found if t is not None]
    return [t for t in several if t.is_floating_point()]


@pytest.mark.parametrize("name", ops.__all__)
def test_derivatives_are_to_what_the_table_says(name: str) -> None:
    arguments, to = rows()[name]
    given = example()
    for one in SHAPES:
        given[one].requires_grad_()
    found = getattr(ops, name)(*(given[argument] for argument in arguments))
    (acts,) = floats(found)
    acts.square().sum().backward()
    assert {one for one in SHAPES if given[one].grad is not None} == set(to)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ops.__all__)
def test_dtypes_are_those_of_the_page(name: str, dtype: torch.dtype) -> None:
    given = example(dtype)
    found = getattr(ops, name)(*(given[argument] for argument in rows()[name][0]))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert floats(found)[0].dtype == (dtype if name in ("spmm", "sum_by_latent") else wide)


def features(n: int) -> torch.Tensor:
    """Rows that are sums of two of 40 directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator), dim=1)
    which = torch.randint(40, (n, 2), generator=generator)
    return directions[which].sum(1)


def test_the_example_learns_and_compiles_to_the_same() -> None:
    found, data = names(), features(100 * 64).view(100, 64, 16)
    torch.manual_seed(0)
    model = found["Autoencoder"](16, 128, 4)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    losses = found["train"](model, data)
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    model.load_state_dict(weights)
    torch.testing.assert_close(found["train"](compiled, data[:20]), losses[:20], rtol=1e-4, atol=1e-6)


def test_the_example_of_a_code_in_csr() -> None:
    given = example()
    x, W_enc, b_enc, W_dec = (given[name] for name in ("x", "W_enc", "b_enc", "W"))
    pre = x @ W_enc.T + b_enc
    expected = torch.where(pre > 0.5, pre, 0) @ W_dec
    torch.testing.assert_close(names()["jumprelu"](x, W_enc, b_enc, W_dec, 0.5), expected)
