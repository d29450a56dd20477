"""`make gpu`, for a CUDA machine: smoke, encoder, step, GPU tests, the rest. Each measurement is a JSON line at once.

    python -m bench.gpu [--out DIR] [--budget SECONDS] [--only STAGE ...] [--rehearse]
    python -m bench.gpu --distil FILE.jsonl [--out bench/results]

Each stage is a process of its own that appends to <out>/gpu-<time>.jsonl (bench/lines.py). One that crashes, hangs or
loses its CUDA context costs the case it was at: it is started again behind that. The first line says what machine this
is. Needs torch, triton, numpy, pytest and, for the C++ extension, a compiler.

--rehearse runs the same plan at tiny sizes on a CPU, kernels in Triton's interpreter. --distil writes the files that
are committed: <device>-<stage>.json.
"""

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import lines
from bench.gpu_plan import Stage, plan
from bench.gpu_process import ROOT, run_stage

OUT, REHEARSAL = ROOT / "build" / "gpu", ROOT / "build" / "rehearsal"
# A stage that says nothing for so long hangs; compiling for the first time takes a minute or two.
PATIENCE_S = 600.0


def run(stages: Sequence[Stage], file: Path, budget: float | None = None, patience: float = PATIENCE_S) -> None:
    """All stages one after another. What is left of a budget is shared out by weight before each."""
    deadline = None if budget is None else time.monotonic() + budget
    for number, stage in enumerate(stages):
        limit = None
        if deadline is not None:
            weights = [later.weight for later in stages[number:]]
            limit = (deadline - time.monotonic()) * stage.weight / sum(weights)
        run_stage(stage, file, limit, stage.patience or patience)


def has_gpu() -> bool:
    """Whether there is anything to run on; asked in a process of its own, so that this one holds no device."""
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question], check=False).returncode == 0


def new_file(out: Path, name: str) -> Path:
    """A file that is not there yet: no run overwrites another's lines."""
    out.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        path = out / f"{name}-{stamp}{suffix}.jsonl"
        if not path.exists():
            return path
    raise SystemExit(f"{out} holds a thousand files of this second")


def summary(found: list[dict[str, Any]]) -> str:
    """A line a stage, and what did not go well."""
    text = []
    for stage in dict.fromkeys(line["stage"] for line in found):
        own = [line for line in found if line["stage"] == stage]
        counts = Counter(line["outcome"] for line in own if line["case"] != "stage")
        seconds = sum(line.get("seconds", 0) for line in own if line["case"] == "stage")
        text.append(f"{stage:<16} {seconds:>7.1f} s  " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    for line in bad(found):
        what = line.get("message") or line.get("error") or ""
        text.append(f"{line['outcome']}: {line['stage']}: {line['case']}: {str(what).strip().splitlines()[-1:]}")
    return "\n".join(text)


def bad(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in found if line["outcome"] in ("failed", "stopped")]


def distil(file: Path, out: Path) -> list[Path]:
    """The lines of each stage, with the machine, as <device>-<stage>.json: medians, spreads, shapes, versions."""
    from bench import common

    found = lines.read(file)
    machine = next((line for line in found if line["case"] == "machine"), None)
    if machine is None or machine["outcome"] != "ok":
        raise SystemExit(f"{file} does not say what machine it is from: nothing is written")
    if machine["rehearsal"]:
        raise SystemExit(f"{file} is a rehearsal's ({machine['device']}): its times are nobody's results")
    paths = []
    for stage in dict.fromkeys(line["stage"] for line in found):
        own = [line for line in found if line["stage"] == stage and line["case"] not in ("machine", "stage")]
        if own:
            body = {"machine": machine, "results": [strip(line) for line in own]}
            paths.append(common.write_named(out, machine["device"], f"gpu-{stage}", machine["versions"], body))
    return paths


def strip(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("stage", "traceback")}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the lines and logs (default: build/gpu)")
    parser.add_argument("--budget", type=float, help="seconds for all of it, shared out by weight (default: no limit)")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long a case measures")
    parser.add_argument("--patience", type=float, default=PATIENCE_S, help="silence after which a case is given up")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages only, after the machine's")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter timings")
    parser.add_argument("--rehearse", action="store_true", help="the same plan at tiny sizes on a CPU")
    parser.add_argument(
        "--distil", type=Path, metavar="FILE", help="write a run's results for committing, measure nothing"
    )
    options = parser.parse_args(argv)
    if options.distil:
        for path in distil(options.distil, options.out or ROOT / "bench" / "results"):
            print(f"written: {path}")
        return 0
    if not options.rehearse and not has_gpu():
        raise SystemExit("torch finds no CUDA device here: --rehearse runs the same plan on a CPU")
    out = (options.out or (REHEARSAL if options.rehearse else OUT)).resolve()
    file = new_file(out, "rehearsal" if options.rehearse else "gpu")
    print(f"lines go to {file}", flush=True)
    stages = plan(out, seconds=options.seconds, quick=options.quick, rehearse=options.rehearse, only=options.only)
    run(stages, file, options.budget, options.patience)
    found = lines.read(file)
    print(f"\n{summary(found)}\nwritten: {file}")
    return 1 if bad(found) else 0


if __name__ == "__main__":
    sys.exit(main())
