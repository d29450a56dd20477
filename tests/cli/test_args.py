"""Bad arguments become one line, however tyro draws its box."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {
    (
        "train",
        "--n-latent",
        "9",
    ): "Unrecognized options: --n-latent, 9 (perhaps --n-latents?); see saefast train --help",
    ("train", "--loss", "mse"): "invalid choice 'mse' for argument '--loss'. Expected one of ('fvu', 'sum', ",
    ("train", "--k", "x"): "--k: 'x' is no count such as 131072, 128Ki or 2.5M; see saefast train --help",
    ("train", "--n-tokens", "1.5"): "--n-tokens: '1.5' is 1.5: expected a whole number; see saefast train --help",
    ("harvest",): "missing: --out PATH folder for the activations (required); see saefast harvest --help",
}
ASK = """
import sys
from saefast.cli.main import main
for line in sys.argv[1].splitlines():
    main(line.split())
"""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_complaint_is_one_line(encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    lines = "\n".join(" ".join(case) for case in CASES)
    child = subprocess.run([sys.executable, "-c", ASK, lines], env=environment, capture_output=True, text=True)
    said = child.stderr.splitlines()
    assert len(said) == len(CASES), child.stderr
    for line, expected in zip(said, CASES.values(), strict=True):
        assert line.startswith(f"saefast: error: {expected}")
