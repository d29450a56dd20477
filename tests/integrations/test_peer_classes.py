"""Files of classes made from another library's import nothing of it until one of them is asked for."""

import importlib
import sys

import pytest

from saefast.errors import InputError
from saefast.integrations.peer_classes import class_of

FILES = {"sae_lens_training": ("SAETrainer", "sae-lens"), "sparsify_training": ("Trainer", "eai-sparsify")}


@pytest.mark.parametrize("file", FILES)
def test_a_library_that_is_not_installed_is_named(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, distribution = FILES[file]
    package = file.removesuffix("_training")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"saefast.integrations.{package}_classes", raising=False)
    module = importlib.import_module(f"saefast.integrations.{file}")
    with pytest.raises(
        InputError, match=f"{name} is for the training loop of {package}, .* pip install {distribution}"
    ):
        getattr(module, name)
    with pytest.raises(AttributeError):
        _ = module.__path__


def test_other_modules_that_are_missing_are_not_taken_for_the_library() -> None:
    with pytest.raises(ModuleNotFoundError):
        class_of("no_such_file", "Name", "sae_lens", "sae-lens")
    with pytest.raises(AttributeError):
        class_of("fused_step", "NoSuchName", "sae_lens", "sae-lens")
