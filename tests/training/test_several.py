"""Several SAEs side by side are, each to the bit, what they would have been alone."""

import os
import signal

import pytest
import torch

from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import load
from saefast.training.api import Stopped, advance, train
from saefast.training.several import Member, train_many

ROWS = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
CONFIG = TrainConfig(n_tokens=640, batch_size=32, lr=1e-3, save_every=5, device="cpu")


def members():
    return {
        "small": Member(ROWS, SAEConfig(d_in=8, n_latents=16, k=2), CONFIG),
        "wide/more": Member(ROWS, SAEConfig(d_in=8, n_latents=64, k=4), CONFIG),
    }


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def alone():
    return {name: train(*member) for name, member in members().items()}


def test_each_member_is_the_run_it_would_be_alone(tmp_path):
    saes = train_many(members(), tmp_path)
    for name, sae in alone().items():
        assert same(saes[name], sae)
        assert same(load(tmp_path / name), sae)
        assert (tmp_path / name / "metrics.jsonl").read_text().count("\n") == 2


def test_members_step_in_turn(monkeypatch):
    steps = []

    def noting(run, *rest):
        steps.append(run.step)
        return advance(run, *rest)

    monkeypatch.setattr("saefast.training.several.advance", noting)
    train_many(members())
    assert steps == [step for step in range(20) for _ in range(2)]


def test_ctrl_c_saves_all_and_resume_ends_as_if_nothing_had_happened(tmp_path, monkeypatch):
    count = 0

    def interrupted(run, *rest):
        nonlocal count
        count += 1
        if count == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(run, *rest)

    monkeypatch.setattr("saefast.training.several.advance", interrupted)
    with pytest.raises(Stopped, match="stopped at step 7"):
        train_many(members(), tmp_path)
    monkeypatch.undo()
    saes = train_many(members(), tmp_path, resume=True)
    for name, sae in alone().items():
        assert same(saes[name], sae)


def test_a_bad_member_is_named_and_no_folder_stays(tmp_path):
    bad = members() | {"wrong": Member(ROWS, SAEConfig(d_in=9, n_latents=16, k=2), CONFIG)}
    with pytest.raises(InputError, match=r"^wrong: .*expected d_in = 9"):
        train_many(bad, tmp_path / "several")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="members is empty"):
        train_many({})


def test_a_name_that_no_folder_can_have_leaves_nothing(tmp_path):
    member = members()["small"]
    with pytest.raises(InputError, match="File name too long"):
        train_many({"n" * 300: member}, tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())
