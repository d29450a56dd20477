"""The last lines of a run in words, and at the command line: what a person sees of short runs and plateaus."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import train_job
from hanging import HANG, wait_until

from saefast.cli.main import main
from saefast.cli.outcome import outcome
from saefast.training.progress import read_metrics

LAST: dict[str, Any] = {
    "step": 80, "fvu": 0.2, "metrics/l0": 32.0, "sparsity/silent_share": 0.0123, "sparsity/silent_tokens": 200_000,
    "sparsity/never_fired_share": 0.001, "details/total_steps": 80,
}  # fmt: skip
HELD = {"heldout/fvu": 0.25, "heldout/fvu_ordinary": 0.25, "heldout/rows": 20_000, "heldout/silent_share": 0.03}


def test_in_words() -> None:
    assert outcome([LAST | HELD]) == [
        "held-out FVU 0.2500 on 20,000 rows, L0 32.0",
        "latents that did not fire: 1.23% in the last 200,000 tokens of training, 0.10% in all of it, 3.00% on the "
        "held-out rows",
    ]
    assert outcome([LAST]) == [
        "FVU 0.2000 on the last batch (no figures of held-out rows), L0 32.0",
        "latents that did not fire: 1.23% in the last 200,000 tokens of training, 0.10% in all of it",
    ]
    falls = {"heldout/fall_per_doubling": 0.031, "heldout/fall_error": 0.004}
    planned = LAST | {"step": 60, "details/total_steps": 500}
    assert outcome(
        [planned, LAST | HELD | falls | {"details/plateau_step": 60, "heldout/fvu": None, "heldout/fvu_ordinary": None}]
    )[::2] == [
        "held-out FVU does not exist on 20,000 rows, L0 32.0",
        "stopped at a plateau: the decay began at step 60 and ended at 80, of 500 planned",
    ]
    few = outcome([LAST | HELD | {"heldout/fvu": 0.001}])[0]
    assert few.startswith("held-out FVU 0.0010 (of ordinary rows 0.2500) on")
    assert outcome([LAST | HELD | falls])[-1] == (
        "before the decay, held-out FVU was still falling (3.1% ±0.4% per doubling of tokens): train longer"
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", train_job.rows(2000).numpy())
    return tmp_path / "x.npy"


def flags(out: Path, **changes: Any) -> list[str]:
    values = (
        dict(out=out, n_latents=4, k=1, batch_size=32, lr=3e-2, dead_after=500, log_every=5, device="cpu") | changes
    )
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str], list[str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code = main(argv)
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err.splitlines()


def test_a_short_run_speaks_on_stderr_a_line_each(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = flags(tmp_path / "run", n_tokens=32 * 20, lr_warmup_steps=100, dead_after=10_000)
    code, out, err = run(["train", str(data), *short], capsys)
    assert code == 0
    assert [line.split(",")[0] for line in err] == [
        "saefast: warning: lr_warmup_steps is 100",
        "saefast: warning: the run has 20 steps of 32 tokens",
        "saefast: warning: dead_after is 10",
    ]
    assert any("latents that did not fire: " in line and "in the last 320 tokens of training" in line for line in out)
    code, out, err = run(["eval", str(tmp_path / "run")], capsys)
    assert (code, err) == (0, [])
    assert any(line.startswith("latents that did not fire: ") for line in out)


def test_a_plateau_ends_a_run_and_the_last_lines_say_so(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*flags(tmp_path / "run", n_tokens=32 * 500, lr_warmup_steps=5, eval_every=5), "--stop-at-plateau"]
    code, out, err = run(["train", str(data), *asked], capsys)
    assert (code, err) == (0, [])
    last = read_metrics(tmp_path / "run")[-1]
    assert f"step {last['step']}/{last['step']} " in next(line for line in out if line.startswith("step"))
    (said,) = [line for line in out if "stopped at a plateau" in line]
    assert said.endswith(f"began at step {last['details/plateau_step']} and ended at {last['step']}, of 500 planned")
    assert any("held-out FVU was flat (" in line for line in out)
    again = run(["train", "--out", str(tmp_path / "run"), "--resume"], capsys)
    assert again == (0, out, [])
    code, _, err = run(["train", str(data), *asked, "--eval-every", "0", "--out", str(tmp_path / "no")], capsys)
    assert (code, len(err)) == (2, 1)
    assert "stop_at_plateau is True and eval_every is 0" in err[0]


def test_ctrl_c_in_a_run_to_its_plateau_and_resume(data: Path, tmp_path: Path) -> None:
    """As a person does it: a process of its own, Ctrl-C, --resume; the figures are those of a run left alone."""
    ask = [sys.executable, "-m", "saefast", "train"]
    options = dict(n_tokens=32 * 2000, lr_warmup_steps=5, eval_every=5, lr=1e-2, n_latents=8, k=2)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent), "OMP_NUM_THREADS": "1"}
    start = [*ask, str(data), *flags(tmp_path / "part", **options), "--stop-at-plateau"]
    child = subprocess.Popen(start, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    metrics = tmp_path / "part" / "metrics.jsonl"
    wait_until(lambda: child.poll() is not None or (metrics.exists() and metrics.stat().st_size > 2000), "metrics")
    child.send_signal(2)
    _, err = child.communicate(timeout=HANG)
    if child.returncode == 130:
        assert re.search(r"saefast: stopped at step \d+ and saved; go on with: saefast train --out .* --resume", err)
    done = subprocess.run(
        [*ask, "--out", str(tmp_path / "part"), "--resume"], env=environment, capture_output=True, timeout=HANG
    )
    assert done.returncode == 0, done.stderr
    whole = [*ask, str(data), *flags(tmp_path / "whole", **options), "--stop-at-plateau"]
    assert subprocess.run(whole, env=environment, capture_output=True, timeout=HANG).returncode == 0
    clocks = ("seconds", "tokens_per_second", "idle_share")
    part, alone = (
        [{name: value for name, value in line.items() if name not in clocks} for line in read_metrics(tmp_path / name)]
        for name in ("part", "whole")
    )
    assert part == alone
