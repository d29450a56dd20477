"""The small smoke under NVIDIA's compute-sanitizer, which watches addresses and shared memory on the device itself."""

import os
import re
import subprocess
import sys
from functools import partial
from typing import Any

from bench import common, lines
from bench.cases import Case, Settings

TOOLS = ("memcheck", "racecheck")
# Exit code by which the tool says that it found something.
FOUND = 99


def cases(settings: Settings) -> list[Case]:
    return [Case(tool, partial(watched, tool, settings.device)) for tool in TOOLS]


def watched(tool: str, device: str) -> dict[str, Any]:
    """One tool over a smoke of small sizes; its own count of errors, and what it printed last."""
    smoke = [sys.executable, "-m", "bench.gpu_stages", "smoke", "--device", device, "--small"]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", *smoke]
    # The smoke's own lines are not wanted twice. torch's cache of memory would hide reads beyond a tensor.
    environment = {name: value for name, value in os.environ.items() if name not in (lines.FILE, lines.BEGUN)}
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    found = subprocess.run(command, cwd=common.ROOT, env=environment, capture_output=True, text=True)
    text = found.stdout + found.stderr
    summary = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: .*", text)
    outcome = "ok" if found.returncode == 0 and summary else "failed"
    return {"outcome": outcome, "exit": found.returncode, "summary": summary, "tail": text.splitlines()[-40:]}
