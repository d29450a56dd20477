"""Every field of every config is a flag of its type, with its help, and nothing is written twice."""

import dataclasses
import functools
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from saefast.cli import main as cli
from saefast.cli.args import parse
from saefast.cli.fields import described
from saefast.cli.finetune import FinetuneArgs
from saefast.cli.harvest import HarvestArgs, harvest_config
from saefast.cli.train import TrainArgs, defaults
from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.harvest.config import HarvestConfig
from saefast.models.config import SAEConfig
from saefast.training.finetune_config import FinetuneConfig
from saefast.training.run_folder import write_config

NO_FLAGS = {(SAEConfig, "metadata")}
ELSEWHERE = {"hooks": "hook"}
ARGS = {"train": TrainArgs, "harvest": HarvestArgs, "finetune": FinetuneArgs}
FIELDS = [
    (config, item.name)
    for config in (SAEConfig, TrainConfig, HarvestConfig, FinetuneConfig)
    for item in dataclasses.fields(config)
    if (config, item.name) not in NO_FLAGS
]


def words_for(hint: Any) -> tuple[list[str], Any]:
    """A value of a type as it is typed, and as it is."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return words_for(next(option for option in inner if option is not type(None)))
    if origin is Literal:
        return [inner[-1]], inner[-1]
    if origin is tuple:
        return (["4,512,1Ki"], (4, 512, 1024)) if inner[0] is int else (["a", "b"], ("a", "b"))
    return {int: (["3"], 3), float: (["0.5"], 0.5), str: (["word"], "word")}[hint]


def parsed(config: type, argv: list[str]) -> Any:
    """What `saefast train` or `saefast harvest` makes of a command line, as attributes."""
    if config is HarvestConfig:
        return harvest_config(parse(HarvestArgs, ["--out", "x", *argv], "harvest"))[0]
    if config is FinetuneConfig:
        return parse(FinetuneArgs, ["run", "out", *argv], "finetune").settings
    # What goes with the odd settings: reproduce_bugs has one engine, and beta1 depends on beta2.
    argv = ["--engine", "autograd", "--beta1", "0.1", *argv]
    args = parse(TrainArgs, argv, "train", defaults(argv))
    return args.sae_config(64, {}) if config is SAEConfig else args.train


def page(capsys: pytest.CaptureFixture[str], command: str) -> str:
    assert cli.main([command, "--help"]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("config", "name"), FIELDS, ids=lambda case: getattr(case, "__name__", case))
def test_every_field_is_a_flag_of_its_type(config: type, name: str) -> None:
    hint, flag = get_type_hints(config)[name], ELSEWHERE.get(name, name).replace("_", "-")
    if hint is bool:
        assert getattr(parsed(config, [f"--{flag}"]), name) is True
        assert getattr(parsed(config, [f"--no-{flag}"]), name) is False
        return
    words, value = (["True"], True) if hint == (bool | None) else words_for(hint)
    if name in ("d_in", "n_latents"):
        words, value = ["64"], 64
    if name == "max_norm_multiple":  # half the median distance would leave out most rows
        words, value = ["2.5"], 2.5
    if name == "crosscode_widths":  # they add up to d_in
        words, value = ["40,24"], (40, 24)
    if name == "n_layers":  # they share d_in
        words, value = ["2"], 2
    assert getattr(parsed(config, [f"--{flag}", *words]), name) == value
    if type(None) in get_args(hint) and name != "text":
        assert getattr(parsed(config, [f"--{flag}", "None"]), name) is None
    if hint not in (str, str | None) and get_origin(hint) is not tuple:
        with pytest.raises(InputError, match=f"^[^\n]*--{flag}[^\n]*see saefast (train|harvest|finetune) --help$"):
            parsed(config, [f"--{flag}", "12x"])


@pytest.mark.parametrize(("config", "command"), [(SAEConfig, "train"), (TrainConfig, "train"), (HarvestConfig, "harvest"), (FinetuneConfig, "finetune")])  # fmt: skip  # noqa: E501
def test_every_field_has_help_and_the_page_shows_it(
    capsys: pytest.CaptureFixture[str], config: type, command: str
) -> None:
    shown, help_texts = page(capsys, command), described(config)
    for kind, name in FIELDS:
        if kind is config:
            assert help_texts[name], f"{name} has no help: add it to the Attributes of {config.__name__}"
            assert f"--{ELSEWHERE.get(name, name).replace('_', '-')} " in shown.replace(",", " ")
            # What a command says of a field in its own words stands in its own class.
            own = {item.name for item in dataclasses.fields(ARGS[command])}
            assert name in own or help_texts[name] in shown


def test_an_empty_command_line_means_the_configs_own_defaults() -> None:
    assert harvest_config(parse(HarvestArgs, ["--out", "x"], "harvest"))[0] == HarvestConfig()
    args = parse(TrainArgs, [], "train")
    assert args.sae_config(768, {}) == SAEConfig(d_in=768, n_latents=16 * 768)
    assert args.train == TrainConfig()


# --- configs that are put together while the program starts, as architectures do it


@dataclass
class Prefixes:
    matryoshka: tuple[int, ...] | None = None
    sizes: tuple[int, ...] = (64, 2048)
    theta_lr: float = 0.01


RULES = ("topk", "batchtopk")
Base = dataclasses.make_dataclass("Base", [("activation", Literal[RULES], "topk")], bases=(Prefixes,))  # type: ignore[valid-type]


@dataclass(kw_only=True)
class Config(Base):  # type: ignore[misc, valid-type]
    """What is trained.

    Attributes:
        width: of the data.
    """

    width: int
    k: int = 4
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.k > self.width:
            raise InputError(f"k is {self.k}: expected at most {self.width}")


PARTS = """        matryoshka: ends of the nested prefixes,
            the last of them the whole.
        sizes: of something.

        theta_lr: how fast theta follows: per step.
        activation: which rule.
        k: latents.

    Raises:
        facts: never.
"""
Config.__doc__ = f"{str(Config.__doc__).rstrip()}\n{PARTS}"


@dataclass
class Args:
    """Train."""

    run: Path = Path("run")
    width: int | None = None
    """of the rows"""
    config: functools.partial[Config] = field(default_factory=lambda: functools.partial(Config, facts={"a": 1}))
    """What it is."""


@dataclass
class Whole:
    """Train."""

    width: Annotated[int, "filled in by the command"] = 9
    config: Config = field(default_factory=lambda: Config(width=9, k=5, facts={"a": 1}))


def test_attributes_are_read_from_the_docstring_as_it_is_now() -> None:
    assert described(Config) == {
        "width": "of the data",
        "matryoshka": "ends of the nested prefixes, the last of them the whole",
        "sizes": "of something",
        "theta_lr": "how fast theta follows: per step",
        "activation": "which rule",
        "k": "latents",
    }
    assert described(Prefixes) == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("512,2048,8192", (512, 2048, 8192)),
        ("2Ki,1M,7", (2048, 10**6, 7)),
        ("3", (3,)),
        ("2,2", (2, 2)),
        ("None", None),
    ],
)
def test_several_counts_are_one_word(text: str, value: object) -> None:
    config = parse(Args, ["--matryoshka", text], "try").config
    assert config.keywords["matryoshka"] == value


def test_what_several_counts_were_taken_for_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    parse(Args, ["--matryoshka", "2Ki,300,1k", "--k", "2Ki"], "try")
    said = capsys.readouterr().err.splitlines()
    assert said == ["saefast: 2Ki is 2,048", "saefast: 1k is 1,000 (1Ki is 1,024)"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--matryoshka 512,x", "--matryoshka: 'x' is no count such as 131072, 128Ki or 2.5M"),
        ("--matryoshka 512,", "--matryoshka: '' is no count such as 131072, 128Ki or 2.5M"),
        ("--matryoshka 1.5,2", "--matryoshka: '1.5' is 1.5: expected a whole number"),
        ("--sizes 512,None", "--sizes: 'None' is no count such as 131072, 128Ki or 2.5M"),
        ("--matryoska 512", "Unrecognized options: --matryoska, 512 (perhaps --matryoshka?)"),
        (
            "--activation relu",
            "invalid choice 'relu' for argument '--activation'. Expected one of ('topk', 'batchtopk')",
        ),
        ("--theta-lr fast", "--theta-lr: could not convert string to float: 'fast'"),
        ("--facts 3", "Unrecognized options: --facts, 3"),
    ],
)
def test_a_wrong_value_is_one_line(argv: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(Args, argv.split(), "try")
    assert str(caught.value) == f"{message}; see saefast try --help"


def test_the_help_page_shows_such_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Args, ["--help"], "try")
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "--width INT of the rows (default: None)",
        "What it is.",
        "--matryoshka INT,INT,... ends of the nested prefixes, the last of them the whole (default: None)",
        "--sizes INT,INT,... of something (default: 64,2048)",
        "--theta-lr FLOAT how fast theta follows: per step (default: 0.01)",
        "--activation {topk,batchtopk} which rule (default: topk)",
        "--k INT latents (default: 4)",
    ):
        assert part in shown
    assert "facts" not in shown
    assert "of the data" not in shown


def test_a_partial_config_is_finished_by_the_command_which_then_checks_it() -> None:
    args = parse(Args, ["--k", "7", "--activation", "batchtopk"], "try")
    assert args.width is None
    made = args.config(width=8)
    assert (made.width, made.k, made.activation, made.facts) == (8, 7, "batchtopk", {"a": 1})
    with pytest.raises(InputError, match="k is 7: expected at most 6"):
        args.config(width=6)


def test_a_whole_config_keeps_what_is_no_flag_and_is_checked_at_once() -> None:
    made = parse(Whole, ["--sizes", "3"], "try").config
    assert made == Config(width=9, k=5, sizes=(3,), facts={"a": 1})
    with pytest.raises(InputError, match="k is 10: expected at most 9; see saefast try --help"):
        parse(Whole, ["--k", "10"], "try")


def test_a_config_in_a_file_gives_every_field_of_the_sae(tmp_path: Path) -> None:
    sae = SAEConfig(d_in=24, n_latents=96, k=5, apply_b_dec_to_input=False, init="kaiming", dtype="bfloat16")
    write_config(tmp_path, sae, TrainConfig(lr=0.5))
    argv = ["--config", str(tmp_path / "config.json")]
    args = parse(TrainArgs, argv, "train", defaults(argv))
    assert (args.n_latents, args.d_in, args.train) == (96, 24, TrainConfig(lr=0.5))
    assert args.sae_config(24, {}) == sae


def test_a_recipe_follows_the_architecture_that_the_flags_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of this recipe is one thing with 32 latents active, as presets give it, and another with 7."""

    def recipe(name: str, **fields: Any) -> tuple[SAEConfig, TrainConfig]:
        config = SAEConfig(**fields)
        return config, TrainConfig(lr=config.k / 1000, batch_size=100)

    monkeypatch.setattr("saefast.cli.train.preset", recipe)
    for argv, k, lr in (([], 32, 0.032), (["--k", "7"], 7, 0.007), (["--k", "7", "--lr", "0.5"], 7, 0.5)):
        args = parse(TrainArgs, argv, "train", defaults(argv))
        assert (args.sae.keywords["k"], args.train.lr, args.train.batch_size) == (k, lr, 100)


def test_counts_of_train_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--n-latents", "2Ki", "--batch-size", "1k"]
    parse(TrainArgs, argv, "train", defaults(argv))
    assert capsys.readouterr().err.splitlines() == ["saefast: 2Ki is 2,048", "saefast: 1k is 1,000 (1Ki is 1,024)"]
