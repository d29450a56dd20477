"""README and CONTRIBUTING show one tree: the folders that exist, rooms in ROOMS' order and with their own sentences."""

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from test_imports import ROOMS

from saefast.models.architecture import Architecture

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md")
# A folder of the checkout, or one of saefast's, which stands further to the right.
LINE = re.compile(r"(    )?(\w+)/ +(\S.*)")


def tree(page: str) -> str:
    """The block below the heading "The tree"."""
    found = re.findall(r"^## The tree\n\n```\n(.*?)^```\n", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    assert len(found) == 1, f"{page} needs one block below '## The tree'"
    return str(found[0])


def shown(page: str) -> tuple[dict[str, str], dict[str, str]]:
    """What a page's tree says of the checkout's folders and of saefast's rooms, by name."""
    lines = [LINE.fullmatch(line) for line in tree(page).splitlines()]
    assert all(lines), "every line is a folder and what it is for"
    outer, rooms = ({m[2]: m[3] for m in lines if m and bool(m[1]) is inner} for inner in (False, True))
    return outer, rooms


def sentence(room: str) -> str:
    """The docstring of a room's __init__."""
    source = (ROOT / "saefast" / room / "__init__.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


def kept() -> set[str]:
    """The folders of the checkout, without what git ignores."""
    ignored = [line.strip("/\n") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()]
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    return {name for name in folders if not any(fnmatch(name, pattern) for pattern in ignored)}


def test_both_pages_show_the_same_tree() -> None:
    first, second = map(tree, PAGES)
    assert first == second


@pytest.mark.parametrize("page", PAGES)
def test_a_tree_shows_the_folders_there_are(page: str) -> None:
    outer, rooms = shown(page)
    assert set(outer) == kept()
    assert set(rooms) == {path.parent.name for path in (ROOT / "saefast").glob("*/__init__.py")}


@pytest.mark.parametrize("page", PAGES)
def test_rooms_stand_in_the_order_in_which_they_import(page: str) -> None:
    outer, rooms = shown(page)
    assert ["kernels", *rooms] == [name for name in ROOMS if name not in ("ground", "saefast")]
    assert list(outer)[:2] == ["kernels", "saefast"]


@pytest.mark.parametrize("page", PAGES)
def test_a_room_is_said_to_be_for_what_its_init_says(page: str) -> None:
    _, rooms = shown(page)
    assert {room: sentence(room) for room in rooms} == {room: f"{text}." for room, text in rooms.items()}


@pytest.mark.parametrize("room", [name for name in ROOMS if name not in ("ground", "saefast", "kernels")])
def test_a_room_says_what_it_is_for_in_one_sentence(room: str) -> None:
    text = sentence(room)
    assert text[:1].isupper()
    assert re.findall(r"[.!?](?=\s|$)", text) == ["."]
    assert text.endswith(".")


def test_adding_an_architecture_names_all_that_one_answers() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("\n## Adding an architecture\n")[2].partition("\n## ")[0]
    asked = {*vars(Architecture), *Architecture.__annotations__}
    unnamed = [name for name in asked if not name.startswith("_") and not re.search(rf"`{name}\b", section)]
    assert unnamed == []
