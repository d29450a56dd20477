"""Counts as people write them, on every command line."""

import dataclasses
import functools
from typing import get_args, get_origin, get_type_hints

import pytest

from saefast.cli import main as cli
from saefast.cli.args import parse
from saefast.cli.counts import count, meant
from saefast.cli.eval import EvalArgs
from saefast.cli.features import FeaturesArgs
from saefast.cli.harvest import HarvestArgs
from saefast.cli.plan import PlanArgs
from saefast.cli.train import TrainArgs
from saefast.errors import InputError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("131072", 131072),
        ("-1", -1),
        ("128k", 128_000),
        ("128K", 128_000),
        ("128Ki", 131_072),
        ("128ki", 131_072),
        ("1M", 10**6),
        ("2.5M", 2_500_000),
        ("16Mi", 2**24),
        ("0.5Mi", 2**19),
        ("1.3B", 1_300_000_000),
        ("2G", 2 * 10**9),
        ("1T", 10**12),
        ("1e6", 10**6),
        ("1.5e3", 1500),
        ("1_000_000", 10**6),
        (" 12 k ", 12_000),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_what_people_write(text: str, value: int) -> None:
    assert count(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "k", "i", "12i", "12bi", "1.5", "1.0005k", "1,000", "1e-3", "1e400", "1e19", "9Ti k", "0x10", "nan", "inf",
     "_", "--1", "9223372036854775808", "1e999999999999"],
)  # fmt: skip
def test_what_means_no_count(text: str) -> None:
    with pytest.raises(ValueError, match=r"count such as|whole number|beyond"):
        count(text)


def test_what_was_meant_is_said_where_it_could_be_in_doubt() -> None:
    assert meant("128000") is None
    assert meant("128k") == "128k is 128,000 (128Ki is 131,072)"
    assert meant("1e6") == "1e6 is 1,000,000"
    assert meant("16Mi") == "16Mi is 16,777,216"
    assert meant("0.0015M") == "0.0015M is 1,500 (0.0015Mi is no whole number)"


# Every option of every command that takes a whole number, by walking the dataclasses that commands are parsed into.
def options(kind: type) -> list[str]:
    found = []
    for name, hint in get_type_hints(kind).items():
        inner = get_args(hint)[0] if get_origin(hint) is functools.partial else hint
        if dataclasses.is_dataclass(inner):
            found += options(inner)  # type: ignore[arg-type]
        elif hint in (int, int | None):
            found.append(name)
    return [*dict.fromkeys(found)]


KINDS = {"harvest": HarvestArgs, "train": TrainArgs, "eval": EvalArgs, "features": FeaturesArgs, "plan": PlanArgs}
POSITIONAL = {"harvest": ["--out", "x"], "eval": ["x"], "features": ["x"]}
CASES = [(command, name) for command, kind in KINDS.items() for name in options(kind)]


def test_the_walk_sees_the_options() -> None:
    seen = {("train", "n_latents"), ("train", "k"), ("train", "n_tokens"), ("train", "seed")}
    assert seen | {("harvest", "max_tokens"), ("harvest", "seed"), ("eval", "lm_tokens")} <= {*CASES}


@pytest.mark.parametrize(("command", "name"), CASES)
def test_every_count_on_every_command_line_takes_them(command: str, name: str) -> None:
    argv = [*POSITIONAL.get(command, []), "--" + name.replace("_", "-")]
    assert value(parse(KINDS[command], [*argv, "2.5k"], command), name) == 2500
    assert value(parse(KINDS[command], [*argv, "2Ki"], command), name) == 2048
    with pytest.raises(InputError, match=r"^(?!.*\n).*2\.5x.* is no count.*see saefast") as caught:
        parse(KINDS[command], [*argv, "2.5x"], command)
    assert name.replace("_", "-") in str(caught.value)


def value(args: object, name: str) -> object:
    for part in (args, *(getattr(args, config, None) for config in ("sae", "train", "settings"))):
        if isinstance(part, functools.partial) and name in part.keywords:
            return part.keywords[name]
        if hasattr(part, name):
            return getattr(part, name)
    raise AssertionError(name)


def test_the_number_chosen_is_printed_and_the_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--device", "h200", "--n-latents", "128k", "--n-tokens", "1B"]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == ["saefast: 128k is 128,000 (128Ki is 131,072)", "saefast: 1B is 1,000,000,000"]
    assert "128,000 latents" in out
    for command in KINDS:
        assert cli.main([command, "--help"]) == 0
        assert "128Ki is 131,072" in " ".join(capsys.readouterr().out.split())
