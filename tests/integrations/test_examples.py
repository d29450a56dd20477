"""The example scripts, as people run them: each trains with the peer's own class and with ours, and compares."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
PEERS = {
    "dictionary_learning_training": "dictionary_learning",
    "sae_lens_training": "sae_lens",
    "sparsify_training": "sparsify",
}
SIZES = ["--d-in", "32", "--n-latents", "256", "--k", "6", "--batch", "128", "--steps", "12", "--device", "cpu"]


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*PEERS, "side_by_side"}


@pytest.mark.peers
@pytest.mark.parametrize("script", PEERS)
def test_the_two_curves_are_one(script: str) -> None:
    """The rows are random, so near ties may choose otherwise for single tokens of the last steps: one of 128 · 6
    entries that is another one changes a loss by less than 1 / 128."""
    if importlib.util.find_spec(PEERS[script]) is None:
        pytest.skip(f"{PEERS[script]} is not installed")
    command = [sys.executable, str(EXAMPLES / f"{script}.py"), *SIZES]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    apart = re.search(r"largest difference of the two curves: (\S+)", ran.stdout)
    assert apart, ran.stdout
    assert float(apart[1]) < 1 / 128
    assert re.search(r"^speed-up: [\d.]+$", ran.stdout, re.M)
