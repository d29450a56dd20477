"""Eval mode around a model's passes and each module's own mode afterwards; ids that an embedding does not have."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from saefast.errors import InputError
from saefast.forward import check_ids, eval_mode


def mixed() -> nn.Module:
    """A model in train mode with a frozen part, in which one module trains."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.ReLU())))
    model[1].eval()
    model[1][1][0].train()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_every_module_has_its_own_mode_back() -> None:
    model = mixed()
    before = modes(model)
    assert before == [True, True, False, False, False, True, False]
    with eval_mode(model):
        assert not any(modes(model))
    assert modes(model) == before
    with pytest.raises(KeyboardInterrupt), eval_mode(model):
        raise KeyboardInterrupt
    assert modes(model) == before


def test_of_two_blocks_at_a_time_the_last_gives_the_modes_back() -> None:
    model = mixed()
    before = modes(model)
    first, second = eval_mode(model), eval_mode(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(modes(model))
    second.__exit__(None, None, None)
    assert modes(model) == before
    with eval_mode(model):
        assert not any(modes(model))
    assert modes(model) == before


def test_a_module_is_told_of_a_change_through_its_own_train() -> None:
    """Adapters merge their weights there."""

    class Merging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[bool] = []

        def train(self, mode: bool = True) -> nn.Module:
            self.asked.append(mode)
            return super().train(mode)

    model = nn.Sequential(Merging())
    with eval_mode(model):
        assert model[0].asked == [False]
    assert model[0].asked[-1] is True
    model.eval()
    model[0].asked.clear()
    with eval_mode(model):
        pass
    # Nothing is done to a model that is in eval mode.
    assert model[0].asked == []


def test_what_is_no_module_is_left_alone() -> None:
    with eval_mode(SimpleNamespace(training=True)):
        pass


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 2)

    def get_input_embeddings(self) -> nn.Module:
        return self.table


class Unsaid(nn.Module):
    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


def test_ids_beyond_the_embedding_are_one_line() -> None:
    message = "token id 10 is given to a Embedded whose vocabulary ends at 9: take the tokenizer that belongs to"
    with pytest.raises(InputError, match=message):
        check_ids(Embedded(), torch.tensor([[3, 10], [1, 2]]))
    check_ids(Embedded(), torch.tensor([[3, 9], [1, 2]]))
    check_ids(Embedded(), torch.zeros(0, 3, dtype=torch.int64))
    for model in (Unsaid(), nn.Linear(1, 1), object(), SimpleNamespace(cfg=SimpleNamespace(d_vocab=11))):
        check_ids(model, torch.tensor([[10]]))
    with pytest.raises(InputError, match="vocabulary ends at 9"):
        check_ids(SimpleNamespace(cfg=SimpleNamespace(d_vocab=10)), torch.tensor([[10]]))
