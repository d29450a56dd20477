"""What the commands share: arguments out of dataclasses, bad ones as one line, and progress where nobody watches."""

import contextlib
import io
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from saefast.cli.counts import HELP, meant
from saefast.cli.fields import rules
from saefast.errors import InputError

T = TypeVar("T")


def parse(kind: type[T], argv: Sequence[str], command: str, default: T | None = None) -> T:
    """An instance of the dataclass `kind` from a command line; its docstrings are the help. Says what counts mean.

    Raises:
        InputError: an unknown, missing or impossible argument.
        SystemExit: after --help.
    """
    args, counts = read(kind, argv, command, default)
    for line in filter(None, map(meant, counts)):
        print(f"saefast: {line}", file=sys.stderr)
    return args


def read(kind: type[T], argv: Sequence[str], command: str, default: T | None = None) -> tuple[T, list[str]]:
    """As `parse`, and says nothing: -> the instance, and the counts as they were written, in that order."""
    _refuse_empty(argv)
    complaint, said = io.StringIO(), io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    counts: dict[str, None] = {}
    given |= {"config": (tyro.conf.OmitArgPrefixes,), "registry": rules(kind, counts)}
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(said):
            return tyro.cli(kind, args=list(argv), prog=f"saefast {command}", **given), [*counts]
    except SystemExit as stop:
        if not stop.code:
            print(f"{_readable(said.getvalue())}\n{HELP}")
            raise
        raise InputError(_one_line(complaint.getvalue(), command)) from None


def _refuse_empty(argv: Sequence[str]) -> None:
    """Raises InputError for an empty value, as an unset shell variable leaves one: no argument means anything by it,
    and an empty path is the current folder to Python."""
    for before, word in zip(["", *argv], argv, strict=False):
        if not word or (word.startswith("--") and word.endswith("=")):
            flag = word[:-1] or (before if before.startswith("--") else "an argument")
            raise InputError(f"{flag} is empty: give it a value, or leave it out")


def _readable(page: str) -> str:
    """tyro's help without the {None}| that it puts before every value that may be left out."""
    usage, _, rest = page.partition("\n")
    rest = re.sub(r"\{None\}\|(\S+)", lambda value: value[1] + " " * len("{None}|"), rest)
    return "\n".join(line.rstrip() for line in [usage.replace("{None}|", ""), *rest.split("\n")])


def _one_line(complaint: str, command: str) -> str:
    """tyro explains a bad argument in a box, or with dashes for its lines where the terminal has only ASCII: a title,
    then parts between rules. The first part is the message; a later one may name what was meant."""
    plain = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│]", " ", complaint)
    body = plain.partition("\n")[2]
    parts = [text for part in re.split(r"[─━-]{8,}", body) if (text := " ".join(part.split()))] or ["bad arguments"]
    message = parts[0].rstrip(".")
    message = re.sub(r"^Error parsing (?:[a-z_]+: )?", "", message)
    message = re.sub(r"^Missing from .*?: ", "missing: ", message)
    # A value that may be left out is a union to tyro, and it reports on each of the types.
    message = re.sub(r"no type matching {None}\|INT\S* could be .*- (?:<class|tuple).*?: ", "", message)
    message = re.sub(
        r"no type matching (?:{None}\|)?(\S+) could be .*? from \[(.*?)\]\. Got.*", r"\2 is no \1", message
    )
    meant = next((part for part in parts if part.startswith("Perhaps you meant")), "")
    near = re.search(r"--[\w-]+", meant)
    return f"{message}{f' (perhaps {near[0]}?)' if near else ''}; see saefast {command} --help"


def peek(argv: Sequence[str], name: str) -> str | None:
    """The value of --name in a command line, before it is parsed; None where it is not there."""
    flag = "--" + name
    for place, word in enumerate(argv):
        word = word.replace("_", "-") if word.startswith("--") and "=" not in word else word
        if word == flag and place + 1 < len(argv):
            return argv[place + 1]
        if word.startswith(flag + "="):
            return word[len(flag) + 1 :]
    return None


def named(files: list[Path], draw: Callable[[], list[Path]]) -> str:
    """The files and the pictures that `draw` makes, in words; without matplotlib, why there are no pictures."""
    try:
        return ", ".join(map(str, files + draw()))
    except InputError as missing:
        return f"{', '.join(map(str, files))} (no pictures: {missing})"


def announce_harvest(run: Path, data: str | None) -> None:
    """Says so where a command begins with a harvest that was not asked for: of a run that trained live."""
    # These wait for torch, and a command that shows a file is there before.
    from saefast.data.provenance import recorded_data
    from saefast.harvest.reharvest import TOKENS, what_is_missing
    from saefast.models.sae import CONFIG
    from saefast.training.run_folder import read_config

    if data is not None or not (run / CONFIG).is_file():
        return
    live = what_is_missing(run, recorded_data(read_config(run)[0].metadata, run))
    if live is not None:
        texts = ", ".join(live["text"]) or "docstrings"
        print(f"{run} trained live: {live['model']} reads {TOKENS:,} tokens of {texts} again, once", flush=True)


def watched() -> bool:
    """Whether a person sees stderr, so that a progress bar makes sense."""
    return sys.stderr.isatty()


class LogLines:
    """Training progress as plain lines, at most one every `seconds`, for logs and pipes."""

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds, self._last = seconds, time.monotonic()

    def __call__(self, line: Mapping[str, Any]) -> None:
        now, total = time.monotonic(), line["details/total_steps"]
        if now - self._last < self._seconds and line["step"] < total:
            return
        from saefast.training.progress import silent

        self._last = now
        print(
            f"step {line['step']}/{total}  loss {line['losses/overall_loss']:.4f}  FVU {line['fvu']:.4f}  "
            f"L0 {line['metrics/l0']:.1f}  {silent(line)}  {line['tokens_per_second']:,.0f} tokens/s  "
            f"idle {line['idle_share']:.1%}{left_out(line)}",
            flush=True,
        )


def left_out(line: Mapping[str, Any]) -> str:
    """How many rows a run has left out, where it has any."""
    n = line.get("rows_left_out", 0)
    return f"  left out {n:,} rows" if n else ""
