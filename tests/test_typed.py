"""Arguments of a wrong type are named where they are given, in one line."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

import saefast
from saefast import ops
from saefast.analysis.evaluation import evaluate
from saefast.data.opening import open_source
from saefast.errors import InputError
from saefast.schema import Count
from saefast.typed import typed


@typed
def function(
    x: Tensor,
    path: str | Path = "x",
    *,
    n: int = 1,
    share: float = 0.5,
    on: bool = True,
    kind: Literal["a", "b"] = "a",
    count: Count | None = None,
    items: Iterable[str] = (),
    call: Callable[[], int] | None = None,
    anything: Any = None,
) -> str:
    """What it does."""
    return "called"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"path": Path("y"), "n": np.int64(3), "share": np.float32(0.5), "on": False, "kind": "b", "count": 3},
        {"share": 1, "items": (word for word in "ab"), "call": len, "anything": object()},
    ],
)
def test_what_fits_goes_through(given: dict[str, Any]) -> None:
    assert function(torch.zeros(1), **given) == "called"
    assert (function.__name__, function.__doc__) == ("function", "What it does.")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"x": [1.0]}, "x is a list: expected Tensor"),
        ({"path": 3}, "path is 3 (int): expected text or a path"),
        ({"path": b"x"}, "path is b'x' (bytes): expected text or a path"),
        ({"n": True}, "n is True (bool): expected int"),
        ({"n": 1.0}, "n is 1.0 (float): expected int"),
        ({"share": "0.5"}, "share is '0.5' (str): expected float"),
        ({"share": 1j}, "share is 1j (complex): expected float"),
        ({"on": 1}, "on is 1 (int): expected bool"),
        ({"kind": "c"}, "kind is 'c' (str): expected 'a' or 'b'"),
        ({"kind": []}, "kind is a list: expected 'a' or 'b'"),
        ({"count": "3"}, "count is '3' (str): expected int or None"),
        ({"items": 3}, "items is 3 (int): expected Iterable"),
        ({"call": 3}, "call is 3 (int): expected Callable or None"),
        ({"path": "\udcff" * 50, "n": None}, "n is None (NoneType): expected int"),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        function(**{"x": torch.zeros(1)} | given)
    assert str(error.value) == said


def test_an_error_is_one_line_of_bounded_length() -> None:
    error = InputError("a path with\na break " + "n" * 10_000 + " end")
    assert str(error).startswith("a path with\\na break nnn")
    assert str(error).endswith("nnn end")
    assert len(str(error)) < 750
    assert "\n" not in str(error)


SAE = saefast.SAE(saefast.SAEConfig(d_in=4, n_latents=8, k=2), seed=0)
X = torch.randn(20, 4)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: saefast.train(X, 3), "sae_config is 3 (int): expected SAEConfig"),
        (lambda: saefast.train(X, SAE.config, on_log=3), "on_log is 3"),
        (lambda: saefast.load(3), "path is 3 (int)"),
        (lambda: saefast.load("x", device=0.5), "device is 0.5"),
        (lambda: saefast.SAE(SAE.config, device="x:y"), "device is 'x:y', which is not there"),
        (lambda: SAE.encode_sparse([1.0]), "x is a list"),
        (lambda: SAE(X.to_sparse()), "x is torch.sparse_coo: expected a dense tensor"),
        (lambda: SAE.decode(torch.tensor(1.0)), "f has shape ()"),
        (lambda: SAE.decode_sparse(torch.ones(2), torch.ones(3)), "acts is (2,), idx (3,)"),
        (lambda: evaluate(SAE, ["x"]), "the batch after 0 rows is a str: expected a tensor (B, 4)"),
        (lambda: evaluate(SAE, X[0]), "the batch after 0 rows is of shape (4,)"),
        (lambda: open_source(X, heldout=None), "heldout is None"),
        (lambda: open_source(lambda batch: batch), "a function that needs arguments"),
        (lambda: saefast.TrainConfig(dead_after=2**63), "dead_after is 9223372036854775808: expected less than 2**63"),
        (lambda: ops.spmm(3, X, X), "acts is 3 (int): expected Tensor"),
        (lambda: ops.sddmm(X.to_sparse(), X, X), "x is torch.sparse_coo: expected a dense tensor"),
    ],
)
def test_public_functions_name_what_they_cannot_take(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"idx": torch.full((5, 3), 8)}, "idx holds 8..8: expected values in [0, 8)"),
        ({"idx": torch.zeros(5, 2, dtype=torch.int32)}, "expected floats and ints, both (batch, k)"),
        ({"idx": torch.zeros(5, 3)}, "expected int32 or int64"),
        ({"n_latents": 0}, "n_latents is 0: expected an int from 1"),
        ({"n_latents": 2**31}, "n_latents is 2147483648: expected an int from 1 to 2**31 - 1"),
    ],
)
def test_transposed_products_check_their_code(changes: dict[str, Any], said: str) -> None:
    """They read and write by idx: an id out of range would be somebody else's memory."""
    good: dict[str, Any] = {"acts": torch.rand(5, 3), "idx": torch.zeros(5, 3, dtype=torch.int32), "n_latents": 8}
    for call in (ops.sum_by_latent, lambda **code: ops.spmm_t(x=torch.rand(5, 4), **code)):
        with pytest.raises(InputError) as error:
            call(**good | changes)
        assert said in str(error.value)


def test_rows_that_run_backwards_are_copied() -> None:
    x = np.arange(40, dtype=np.float32).reshape(10, 4)
    assert torch.equal(next(open_source(x[::-1, ::-1]).batches(9))["x"].sum(), torch.tensor(x[1:].sum()))


def test_a_tensor_is_one_batch_to_evaluate() -> None:
    assert math.isclose(evaluate(SAE, X).compute()["fvu"], evaluate(SAE, [X[:7], X[7:]]).compute()["fvu"])


def test_more_scratch_than_any_machine_has_is_as_much_as_is_wanted() -> None:
    W = torch.randn(8, 4)
    for one, other in zip(
        ops.encode_topk(X, W, None, 2), ops.encode_topk(X, W, None, 2, max_scratch_bytes=10**30), strict=True
    ):
        assert torch.equal(one, other)
