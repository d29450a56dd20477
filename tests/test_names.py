"""One op, one name: whoever knows a kernel's name knows where its reference, its tests and its benchmark are."""

from pathlib import Path
from types import FunctionType

import pytest

from saefast import ops
from saefast.ops import reference
from saefast.optim import reference as rows

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if path.stem != "tuning")
# kernels/row_update.py updates one matrix's rows; the operation takes several jobs.
OTHERWISE = {"row_update": "update_rows"}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_has_a_reference_a_test_and_a_benchmark(name: str) -> None:
    asked_for = OTHERWISE.get(name, name)
    plain = getattr(reference, asked_for, None) or getattr(rows, asked_for, None)
    assert isinstance(plain, FunctionType), f"no reference is named {asked_for}"
    for path in (ROOT / "tests" / f"test_{name}.py", ROOT / "bench" / f"{name}.py"):
        assert path.is_file(), f"{path.relative_to(ROOT)} is not there"


@pytest.mark.parametrize("name", ops.__all__)
def test_an_op_has_a_file_a_reference_and_its_name_alone(name: str) -> None:
    """`ops.x` is the function, whatever was imported first: the package binds it after its file was read."""
    found = getattr(ops, name)
    assert isinstance(found, FunctionType)
    assert (found.__module__, found.__name__) == (f"saefast.ops.{name}", name)
    assert isinstance(getattr(reference, name), FunctionType)
