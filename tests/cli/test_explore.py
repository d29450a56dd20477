"""`saefast explore`: what it says, where it serves, what opens it, and how it ends."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hanging import HANG
from latents_db import make_db

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from saefast.cli import explore
from saefast.cli import main as cli
from saefast.errors import InputError

ROOT = Path(__file__).resolve().parent.parent.parent
# Says so if torch was imported, and is otherwise `python -m saefast`.
PROGRAM = """
import sys
from saefast.cli.main import main
code = main(sys.argv[1:])
print("torch" if "torch" in sys.modules else "no torch")
sys.exit(code)
"""


@contextmanager
def started(run: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and the address that it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "explore", str(run), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | (env or {}),
    )
    assert process.stdout is not None
    address = ""
    try:
        while line := process.stdout.readline():
            if found := re.search(r"http://\S+", line):
                address = found[0]
            if "Ctrl-C" in line:
                break
        yield process, address
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def get(address: str, cookie: str = "") -> http.client.HTTPResponse:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.netloc, timeout=HANG)
    connection.request("GET", f"{parts.path}?{parts.query}", headers={"Cookie": cookie} if cookie else {})
    return connection.getresponse()


def test_serves_what_its_address_opens_and_ends_at_ctrl_c(tmp_path: Path) -> None:
    make_db(tmp_path)
    with started(tmp_path, "--no-browser", "--port", "0") as (process, address):
        assert get(address.partition("?")[0]).status == 403
        opened = get(address)
        assert opened.status == 303
        cookie = (opened.getheader("Set-Cookie") or "").partition(";")[0]
        assert get(address.partition("?")[0] + "static/base.css", cookie).status == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=HANG)
        assert (process.returncode, err) == (0, "")
    # What the pages above showed needs no torch, which takes seconds to import.
    assert out.split("\n")[-3:] == ["saefast explore has ended", "no torch", ""]


def test_the_browser_is_given_an_address_that_works_once(tmp_path: Path) -> None:
    """The command line of a browser is no secret on a machine of several users."""
    make_db(tmp_path)
    told = tmp_path / "told"
    os.mkfifo(told)
    browser = tmp_path / "browser"
    browser.write_text(f"#!/bin/sh\necho \"$1\" > '{told}'\n")
    browser.chmod(0o755)
    with started(tmp_path, "--port", "0", env={"BROWSER": f"{browser} %s"}) as (_, address):
        given = told.read_text().strip()
        assert given.partition("=")[0] == address.partition("=")[0]
        assert given != address
        assert [get(given).status, get(given).status, get(address).status] == [303, 403, 303]


@pytest.mark.parametrize(
    ("env", "opened"), [({}, 0), ({"DISPLAY": ":0"}, 1), ({"WAYLAND_DISPLAY": "x"}, 1), ({"BROWSER": "firefox"}, 1)]
)
def test_a_browser_is_opened_where_it_has_a_window(
    env: dict[str, str], opened: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a screen Python opens w3m, lynx and the like, in the terminal that has just been told the address."""
    make_db(tmp_path)
    calls: list[str] = []
    told = threading.Event()
    monkeypatch.setattr(explore.webbrowser, "open", lambda address: (calls.append(address), told.set()))
    monkeypatch.setattr(explore, "serve", lambda *_: told.wait(HANG) if opened else None)
    monkeypatch.setattr(explore.sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["explore", str(tmp_path), "--port", "0"]) == 0
    assert len(calls) == opened
    assert cli.main(["explore", str(tmp_path), "--port", "0", "--no-browser"]) == 0
    assert len(calls) == opened


def test_who_came_by_ssh_is_told_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_db(tmp_path)
    monkeypatch.setattr(explore, "serve", lambda *_: None)
    for came, lines in (("10.0.0.1 22 10.0.0.2 22", 1), ("", 0)):
        monkeypatch.setenv("SSH_CONNECTION", came)
        assert cli.main(["explore", str(tmp_path), "--no-browser", "--port", "0"]) == 0
        out = capsys.readouterr().out
        port = re.search(r"http://127.0.0.1:(\d+)/", out)
        assert port is not None
        assert out.count(f"ssh -L {port[1]}:127.0.0.1:{port[1]} ") == lines


def test_the_default_port_gives_way_and_one_that_was_asked_for_does_not() -> None:
    with closing(explore.listening(None)) as first, closing(explore.listening(None)) as second:
        ports = [listener.getsockname() for listener in (first, second)]
        assert ports[0][1] < ports[1][1] < explore.FIRST_PORT + explore.PORTS_TRIED
        assert {host for host, _ in ports} == {"127.0.0.1"}
        with pytest.raises(InputError, match=rf"port {ports[0][1]} is taken: give another, or leave --port out"):
            explore.listening(ports[0][1])


def test_answers_are_sent_at_once() -> None:
    """An answer is a head and a body; the body must not wait until the head has been acknowledged, 40 ms later."""
    told: list[int] = []

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def ask() -> None:
        with explore.listening(0) as listener:
            async with await asyncio.start_server(answer, sock=listener):
                reader, writer = await asyncio.open_connection(*listener.getsockname())
                await reader.read()
                writer.close()

    asyncio.run(ask())
    assert told[0] != 0


def test_says_so_where_no_port_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        monkeypatch.setattr(explore, "FIRST_PORT", taken.getsockname()[1])
        monkeypatch.setattr(explore, "PORTS_TRIED", 1)
        with pytest.raises(InputError, match="are all taken"):
            explore.listening(None)


def damaged(folder: Path) -> None:
    make_db(folder).write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)


def older(folder: Path) -> None:
    import sqlite3

    with closing(sqlite3.connect(make_db(folder))) as db:
        db.execute("PRAGMA user_version = 0")


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (make_db, ["--port", "65536"], "port is 65536: expected 1 to 65535, or 0 for any that is free"),
        (make_db, ["--port", "-1"], "port is -1"),
        (make_db, ["nowhere"], "other is nowhere: expected the folder of a run"),
        (damaged, [], "latents.db is damaged, or no SQLite file"),
        (older, [], "latents.db is version 0: expected version"),
    ],
)
def test_bad_input_is_one_line(
    make: object, options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path)  # type: ignore[operator]
    assert cli.main(["explore", str(tmp_path), "--no-browser", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_no_folder_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explore", str(tmp_path / "nothing")]) == 2
    assert "nothing: expected the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "jinja2"])
def test_without_its_packages_it_names_the_extra(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_db(tmp_path)
    for name in [name for name in sys.modules if name.startswith("saefast.explorer")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    # Served without a package, it would never end.
    monkeypatch.setattr(explore, "serve", lambda *_: None)
    assert cli.main(["explore", str(tmp_path), "--no-browser"]) == 2
    assert f"the package {package} is missing: pip install 'saefast[explore]'" in capsys.readouterr().err


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run on a harvest of a tiny language model, without latents.db."""
    import tiny_models

    monkeypatch.chdir(tmp_path)
    tiny_models.model("gpt2", head=True).save_pretrained("model")
    tiny_models.tokenizer(special=False).save_pretrained("model")
    lines = [json.dumps({"text": document}) for document in tiny_models.documents(40)]
    Path("text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    harvest = "harvest --model model --text text.jsonl --hook layers.1 --out acts --ctx-len 24 --heldout 0.2"
    train = "train acts --out run --n-latents 40 --k 4 --batch-size 64 --n-tokens 640 --device cpu"
    for line in (harvest, train):
        assert cli.main(line.split()) == 0
    capsys.readouterr()
    # What would be served until Ctrl-C.
    monkeypatch.setattr(explore, "serve", lambda *_: None)
    return tmp_path / "run"


def test_latents_db_is_made_where_it_is_missing(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explore", "run", "--no-browser", "--port", "0"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("run has no latents.db yet: its rows are read once to make it\nrun: 40 latents\nopen http://")
    made = (trained / "latents.db").stat()
    assert cli.main(["explore", "run", "--no-browser", "--port", "0"]) == 0
    assert "has no latents.db" not in capsys.readouterr().out
    assert (trained / "latents.db").stat() == made


def test_ctrl_c_while_it_is_made_leaves_nothing(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = sorted(path.name for path in trained.iterdir())
    monkeypatch.setattr("saefast.latents.schema.finish", interrupted)
    monkeypatch.setattr("saefast.latents.build.finish", interrupted)
    assert cli.main(["explore", "run", "--no-browser", "--port", "0"]) == 130
    assert sorted(path.name for path in trained.iterdir()) == before
    assert capsys.readouterr().err == "saefast: interrupted\n"


def test_a_folder_without_a_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explore", str(tmp_path), "--no-browser"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_that_trains_is_served_for_its_curves(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    latents, why = explore.open_latents(tmp_path)
    assert latents is None
    assert "still training" in why
