"""One measuring stage of bench/gpu.py, in the process that this is:

    python -m bench.gpu_stages STAGE --device cpu|cuda [--rehearse] [--small] [--seconds 3]

A stage is a list of cases. Each one's result or failure is a line before the next begins. Started again after its
process died, a stage goes on behind the case that was running then.
"""

import argparse
import importlib
import os
import platform
import subprocess
import sys
from contextlib import suppress
from typing import Any

import torch

from bench import common, lines
from bench.cases import Case, Settings, run_cases


def facts(settings: Settings) -> dict[str, Any]:
    """What the figures belong to: the first line of a file."""
    found: dict[str, Any] = {"device": "cpu, interpreter" if settings.rehearse else common.device_name(settings.device)}
    found |= {
        "versions": common.versions(),
        "commit": commit(),
        "processors": os.cpu_count(),
        "rehearsal": settings.rehearse,
    }
    found["system"] = f"{platform.system()} {platform.machine()}"
    if settings.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "capability": list(torch.cuda.get_device_capability(0)),
            "memory_bytes": properties.total_memory,
            "free_bytes": torch.cuda.mem_get_info(0)[0],
            "multiprocessors": properties.multi_processor_count,
            "L2_bytes": properties.L2_cache_size,
            "smi": smi(),
        }
    return found


def commit() -> str | None:
    """The commit that is checked out, with a + where files were changed since."""
    with suppress(OSError, subprocess.SubprocessError):
        options: dict[str, Any] = dict(cwd=common.ROOT, capture_output=True, text=True, check=True, timeout=60)
        head = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **options).stdout.strip()
        return head + "+" * bool(changed)
    return None


def smi() -> dict[str, str] | None:
    """Driver, clocks and power as nvidia-smi has them."""
    names = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        return dict(zip(names.split(","), (value.strip() for value in found.splitlines()[0].split(",")), strict=False))
    return None


MODULES = {
    "smoke": "bench.gpu_smoke",
    "kernels": "bench.gpu_kernels",
    "step": "bench.gpu_step",
    "sanitizer": "bench.gpu_sanitizer",
}


def cases(stage: str, settings: Settings) -> list[Case]:
    if stage == "machine":
        return [Case("machine", lambda: facts(settings))]
    # Imported here: these import the kernels, and whether that works is a result too.
    module = importlib.import_module(MODULES[stage])
    found: list[Case] = module.cases(settings)
    return found


def interpret() -> set[str]:
    """Lets Triton's interpreter serve CPU tensors where kernels serve a GPU's, engines included.

    Returns the names of the kernels launched from now on.
    """
    sys.path.append(str(common.ROOT / "tests"))
    import interp

    from saefast.ops import backends, mixed

    interp.speed_up()
    # As on a GPU: candidates come from bf16 products, and no C++ takes them over.
    mixed.pays_off = lambda W: W.dtype == torch.float32
    backends.backend = lambda t, served=backends.NATIVE: "triton" if t.dtype in served else "reference"
    return launches()


def launches() -> set[str]:
    """A set that gets the name of every kernel the interpreter launches."""
    from triton.runtime.interpreter import GridExecutor

    launch, names = GridExecutor.__call__, set()

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.add(self.fn.__name__)
        return launch(self, *args, **kwargs)

    GridExecutor.__call__ = noted
    return names


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_stages", description="A stage of bench.gpu.")
    parser.add_argument("stage", choices=("machine", *MODULES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    settings = Settings(options.device, options.rehearse, options.small, options.seconds)
    launched = interpret() if settings.rehearse and options.stage != "machine" else None
    run_cases(cases(options.stage, settings), settings.device)
    if launched:
        lines.record("kernels launched", names=sorted(launched))
    return 0


if __name__ == "__main__":
    sys.exit(main())
