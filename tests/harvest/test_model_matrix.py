"""docs/models.md shows what is checked of each architecture: all of it is checked here, and would be seen to fail."""

import contextlib
from typing import Any

import model_matrix
import pytest
import torch
from model_matrix import BEGIN, CHECKS, END, PAGE, SHOWN, built, plain, row, table, texts

from saefast import places
from saefast.harvest import capture

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """These models are so small that threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shown() -> list[str]:
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip().splitlines()


@pytest.mark.parametrize("name", SHOWN)
def test_every_cell_holds_and_the_page_shows_it(name: str) -> None:
    assert row(name) in shown()


def test_the_page_shows_these_architectures_in_this_order_and_no_others() -> None:
    lines = shown()
    assert lines[:2] == table([]).splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == [called for called, _ in SHOWN.values()]
    assert len(lines) - 2 >= 20


def one_token_late(self: Any, place: Any) -> torch.Tensor:
    return self._values[place][0].roll(1, 1)


def without_masks(self: Any, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids}


def the_last_turn(self: Any, place: Any, given: Any) -> None:
    """What was once done: each turn takes the place of the one before, until every hook has something."""
    self.next(place)
    self._values[place].clear()
    self._values[place].append(self._shaped(given, str(place)).clone())


@contextlib.contextmanager
def nothing(_model: Any) -> Any:
    yield


BROKEN = {
    "outputs": ("gpt2", places.Taken, "value", one_token_late),
    "inputs": ("gpt2", places, "_on_input", places._on_output),
    "padding": ("bert", capture.ModuleRunner, "_inputs", without_masks),
    "company": ("albert", places.Taken, "take", the_last_turn),
    "in = out before": ("llama", places, "_on_input", places._on_output),
    "train mode": ("gpt2", capture, "eval_mode", nothing),
    "splice": ("gpt2", places, "with_activations", lambda given, hidden: hidden * 1.001),
    "turns": ("albert", places._Turns, "check", lambda self, place: None),
}


@pytest.mark.parametrize("column", CHECKS)
def test_a_cell_would_fail(column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, where, attribute, broken = BROKEN[column]
    of = built(name)
    wanted = [plain(of, ids) for ids in texts()[1]]
    CHECKS[column](of, wanted)
    monkeypatch.setattr(where, attribute, broken)
    with pytest.raises((AssertionError, IndexError)):
        CHECKS[column](of, wanted)


def test_rows_of_a_decoder_that_reads_the_text_alone_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the token before, as they once were."""
    of = built("bart with a head")
    wanted = [plain(of, ids) for ids in texts()[1]]
    monkeypatch.setattr(capture, "decoder_of", lambda *_: None)
    with pytest.raises(AssertionError, match=r"model\.decoder.* differs from a pass by hand"):
        model_matrix.check_outputs(of, wanted)
