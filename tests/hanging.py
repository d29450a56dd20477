"""What tests wait by: conditions, and one limit that only a hang reaches."""

import time
from collections.abc import Callable

# Seconds. No test may depend on how fast the machine is: this is hundreds of times what the slowest child process takes
# on an idle one, and ends a suite that would stand still for ever.
HANG = 3600.0


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Returns when the condition holds."""
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end, f"hangs: {what} did not come about"
        time.sleep(0.005)
