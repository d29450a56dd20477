"""How close a kernel has to be: at most twice as far from the exact result as torch is in the same dtype."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def assert_close_to_reference(
    out: Tensor,
    fn: Callable[..., Tensor],
    *args: Any,
    factor: float = 2.0,
    per_row: bool = False,
    **kwargs: Any,
) -> None:
    """Checks max|out - exact| <= factor · max|fn(args) - exact| + eps · max|exact|, exact = fn(args in float64).

    The last term is one rounding of the largest value to out's dtype: fn may be exact by luck (sums of integers, one
    term per sum), and a correctly rounded result must not fail for that. fn has to work at the kernel's precision: if
    the kernel multiplies in tf32, so must torch.

    Args:
        out: what the kernel gave; its shape is fn's.
        fn: the same operation in plain torch; called with *args and **kwargs, and with the floating tensors among
            *args in float64.
        per_row: compare maxima row by row (all dimensions but the first) where rows differ in scale: a single maximum
            hides a wrong row of small norm.
    """
    exact = fn(*(_double(arg) for arg in args), **kwargs).double()
    assert out.shape == exact.shape, f"shape {tuple(out.shape)}, expected {tuple(exact.shape)}"
    if out.numel() == 0:
        return
    rows = (out.shape[0], -1) if per_row else (1, -1)
    error = (out.double() - exact).abs().reshape(rows)
    torch_error = (fn(*args, **kwargs).double() - exact).abs().reshape(rows)
    one_rounding = torch.finfo(out.dtype).eps * exact.abs().reshape(rows).amax(1)
    allowed = factor * torch_error.amax(1) + one_rounding
    worst, at = error.max(1)
    # Written so that a NaN anywhere fails.
    wrong = ~(worst <= allowed)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        place = f"row {row}, element {int(at[row])} of it" if per_row else f"element {int(at[row])}"
        raise AssertionError(
            f"{place}: off by {float(worst[row]):.3e}; {factor} x torch's own error in {out.dtype} allows "
            f"{float(allowed[row]):.3e}; {int(wrong.sum())} of {len(wrong)} maxima are too large"
        )


def _double(arg: Any) -> Any:
    return arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg
