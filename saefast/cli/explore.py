"""`saefast explore`: a run's dictionary in the browser. Imports no torch where latents.db is there."""

import errno
import os
import socket
import sys
import threading
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from saefast.cli.args import parse
from saefast.errors import InputError
from saefast.latents.database import LatentsDB
from saefast.latents.schema import LATENTS_DB

if TYPE_CHECKING:
    from saefast.explorer.state import Explorer

HOST = "127.0.0.1"
FIRST_PORT, PORTS_TRIED = 8765, 100
# Seconds that answers under way have to end after Ctrl-C; a page that watches a run would never end.
GRACE = 1


@dataclass
class ExploreArgs:
    """See what a run's dictionary holds: a page in your browser, served on this machine to you alone.

    Shows latents with their texts, what each token of a text of yours turns on, a map, the run's curves, and two runs
    side by side. Where the run has no latents.db yet, this makes it first, as saefast features does. Ctrl-C ends it.
    """

    run: tyro.conf.Positional[Path]
    """folder of a run, finished or still training"""
    other: tyro.conf.Positional[Path | None] = None
    """folder of a second run, to compare it with"""
    data: str | None = None
    """harvest or rows to look at, where the run's own is elsewhere now"""
    model: str | None = None
    """language model that was harvested, where it is not found by its name: a folder, or a name that loads it"""
    port: int | None = None
    """where to serve; default the first free one from 8765 on"""
    browser: bool = True
    """open the page in the browser; with --no-browser its address is printed alone"""


def main(argv: list[str]) -> int:
    args = parse(ExploreArgs, argv, "explore")
    # Missing packages are told before minutes are spent on latents.db.
    import jinja2  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401

    from saefast.explorer.state import Explorer

    _check(args)
    with listening(args.port) as listener:
        port = listener.getsockname()[1]
        latents, why = open_latents(args.run, args.data, args.model)
        other = args.other and args.other.resolve()
        explorer = Explorer(args.run.resolve(), latents, other, why, args.model, args.data, port)
        print("\n".join([_about(args.run, latents, why), *_where(explorer), "Ctrl-C ends it"]), flush=True)
        if args.browser and has_screen():
            # Some browsers return when they are closed.
            address = explorer.address(explorer.ticket)
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        serve(explorer, listener)
    print("\nsaefast explore has ended")
    return 0


def _where(explorer: "Explorer") -> list[str]:
    """How to open the page, also from the machine that somebody sits at who came here by ssh."""
    lines = [f"open {explorer.address(explorer.token)}"]
    if os.environ.get("SSH_CONNECTION"):
        lines.append(
            f"from your own machine, after: ssh -L {explorer.port}:{HOST}:{explorer.port} {socket.gethostname()}"
        )
    return lines


def has_screen() -> bool:
    """Whether a browser would have a window: one for text would take the terminal from us."""
    named = any(os.environ.get(name) for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"))
    return named or sys.platform in ("darwin", "win32")


def _check(args: ExploreArgs) -> None:
    for name, folder in (("run", args.run), ("other", args.other)):
        if folder is not None and not folder.is_dir():
            raise InputError(f"{name} is {folder}: expected the folder of a run")
    if args.port is not None and not 0 <= args.port < 1 << 16:
        raise InputError(f"port is {args.port}: expected 1 to 65535, or 0 for any that is free")


def open_latents(run: Path, data: str | None = None, model: str | None = None) -> tuple[LatentsDB | None, str]:
    """A run's latents.db, made where it is missing; None and why where there is no SAE yet.

    Args:
        data, model: as make_latents takes them.

    Raises:
        InputError: the folder holds no run, or its latents.db cannot be made or read.
    """
    if (run / LATENTS_DB).exists():
        return LatentsDB(run / LATENTS_DB), ""
    from saefast.models.sae import WEIGHTS
    from saefast.training.progress import METRICS

    if not (run / WEIGHTS).exists() and (run / METRICS).exists():
        return None, f"{run.name} is still training: there are curves to see, and latents once it has ended"
    from saefast.cli.features import make_latents

    print(f"{run} has no {LATENTS_DB} yet: its rows are read once to make it", flush=True)
    return make_latents(run, data, model), ""


def _about(run: Path, latents: LatentsDB | None, why: str) -> str:
    return why if latents is None else f"{run}: {latents.n_latents:,} latents"


def listening(port: int | None) -> socket.socket:
    """A socket that listens on this machine alone.

    Args:
        port: None takes the first free one from FIRST_PORT on.

    Raises:
        InputError: the port that was asked for is taken or not allowed, or none is free.
    """
    wanted = range(FIRST_PORT, FIRST_PORT + PORTS_TRIED) if port is None else [port]
    for number in wanted:
        # asyncio sends at once (TCP_NODELAY) where a socket says that it is TCP's: without, each page is 40 ms late.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        # A port that another program left a moment ago is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, number))
            listener.listen(128)
        except OSError as error:
            listener.close()
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            reason = "taken" if error.errno == errno.EADDRINUSE else "not yours to open"
        else:
            return listener
    if port is not None:
        raise InputError(f"port {port} is {reason}: give another, or leave --port out for one that is free")
    raise InputError(f"ports {wanted[0]} to {wanted[-1]} are all taken: give --port another")


def serve(explorer: "Explorer", listener: socket.socket) -> None:
    """Answers until Ctrl-C."""
    import uvicorn

    from saefast.explorer.app import make_app

    config = uvicorn.Config(
        make_app(explorer),
        log_level="warning",
        access_log=False,
        lifespan="off",
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE,
    )
    # uvicorn ends in order and then raises the Ctrl-C that it was ended by.
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        return
