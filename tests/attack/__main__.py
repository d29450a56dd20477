"""`make attack`: saefast killed, given damaged files and bad arguments, used over and over; a table of what came of it.

    make attack                                   everything, in about a quarter of an hour on two cores
    make attack ARGS="--part fuzz"                one part; the table keeps what the others found before
    make attack ARGS="--part fuzz --case 1234"    one damaged file again, with its traceback
    make attack ARGS="--part formats"             damaged files of other libraries' SAEs
    make attack ARGS="--part latents"             damaged files that the explorer and exports read

Exit code 1 where there was a fault. How to read the table: docs/attack.md.
"""

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from attack import arguments, fuzz, kill, soak, summary
from attack.outcome import FAULTS
from attack.summary import Row


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.case is not None:
        return again(args)
    parts = args.part or list(PARTS)
    results = summary.Results(args.out, args.seed)
    for part in parts:
        for row in PARTS[part](args):
            results.add(part, row)
            if row.outcome in FAULTS:
                print(f"{row.outcome}: {row.what}: {row.detail}\n    again: {row.again}", flush=True)
        results.finish(part)
        results.write()
    print(results.table())
    return 1 if results.faults(parts) else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("make attack", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), action="append", help="only this part; may be given again")
    parser.add_argument("--kills", type=int, default=200, help="processes to kill")
    parser.add_argument("--mutations", type=int, default=20_000, help="files to damage")
    parser.add_argument("--rounds", type=int, default=150, help="of the soak")
    parser.add_argument("--first", type=int, default=0, help="number of the first damaged file")
    parser.add_argument(
        "--case", type=int, help="one damaged file, or odd argument, in this process, with its traceback"
    )
    parser.add_argument("--only", default="", help="only readers, or conditions, with this in their names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that read damaged files")
    parser.add_argument("--out", type=Path, help="where the figures go: a .json; none without it")
    return parser.parse_args(argv)


def again(args: argparse.Namespace) -> int:
    """One damaged file or odd argument in this process, with all that it says."""
    with tempfile.TemporaryDirectory(prefix="saefast-attack-") as place:
        odd = args.part == ["arguments"]
        part = args.part[0] if args.part in (["formats"], ["latents"]) else "fuzz"
        arena = arguments.Arguments(place, args.only) if odd else fuzz.Fuzz(place, args.seed, args.only, part)
        try:
            print(arena.show(args.case))
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


def run_kill(args: argparse.Namespace) -> Iterator[Row]:
    chosen = [condition for condition in kill.CONDITIONS if args.only in condition.name]
    with tempfile.TemporaryDirectory(prefix="saefast-attack-") as place:
        yield from kill.run(Path(place), args.kills, args.seed, chosen)


def run_fuzz(args: argparse.Namespace) -> Iterator[Row]:
    return fuzz.run(range(args.first, args.first + args.mutations), args.seed, args.workers, args.only)


def run_formats(args: argparse.Namespace) -> Iterator[Row]:
    """Half as many of the files of other libraries' SAEs."""
    return fuzz.run(range(args.first, args.first + args.mutations // 2), args.seed, args.workers, args.only, "formats")


def run_latents(args: argparse.Namespace) -> Iterator[Row]:
    """A quarter as many of latents.db."""
    return fuzz.run(range(args.first, args.first + args.mutations // 4), args.seed, args.workers, args.only, "latents")


def run_arguments(args: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="saefast-attack-") as place:
        yield from arguments.run(place, workers=args.workers, only=args.only)


def run_soak(args: argparse.Namespace) -> Iterator[Row]:
    return soak.run(args.rounds)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "kill": run_kill,
    "fuzz": run_fuzz,
    "formats": run_formats,
    "latents": run_latents,
    "arguments": run_arguments,
    "soak": run_soak,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
