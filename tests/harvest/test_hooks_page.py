"""docs/hooks.md says what the code does: its table of places, its numbers, its messages."""

import re
from pathlib import Path

import architectures
import pytest
import tiny_models

from saefast.errors import InputError
from saefast.harvest import lens_names
from saefast.harvest.hooks import find_hook

pytest.importorskip("transformers")
PAGE = (Path(__file__).parents[2] / "docs" / "hooks.md").read_text(encoding="utf-8")
COLUMNS = ("gpt2", "llama", "neox", "gemma2")


def table() -> dict[str, list[str]]:
    """Name within a block -> the cells of its row, without quotes."""
    body = PAGE.split("| `blocks.N.` ... |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in body]
    return {name: cells for name, *cells in rows}


@pytest.mark.parametrize(("column", "name"), list(enumerate(COLUMNS)))
def test_the_table_of_places_is_what_is_found(column, name):
    model = architectures.build(name)
    block = find_hook(model, "layers.1").path
    for hook, cells in table().items():
        if cells[column] == "–":
            with pytest.raises(InputError, match="has no place in"):
                find_hook(model, f"blocks.1.{hook}")
            continue
        place = "" if cells[column] == "itself" else cells[column]
        written = f"{block}{'' if place[:1] in ('', ':') else '.'}{place}"
        assert find_hook(model, f"blocks.1.{hook}").path == written, hook


def test_the_table_has_every_name():
    named = {
        *lens_names.IN_BLOCK,
        "hook_resid_mid",
        "hook_mlp_in",
        "hook_attn_out",
        "hook_mlp_out",
        "mlp.hook_pre_linear",
    }
    assert table().keys() == named - {"hook_in", "hook_out"}
    for name in ("hook_in", "hook_out", "hook_embed", "ln1.hook_normalized", "ln2.hook_normalized"):
        assert f"`{name}`" in PAGE


def test_messages_are_those_that_are_given():
    with pytest.raises(InputError) as refused:
        find_hook(tiny_models.model("gpt2"), "layers.7")
    assert f"saefast: error: {refused.value}\n" in PAGE
    with pytest.warns(RuntimeWarning) as said:
        find_hook(architectures.build("llava"), "layers.1")
    assert f"\n{said[0].message}\n" in PAGE


def test_the_numbers_of_architectures_are_those_of_the_test_against_transformer_lens():
    source = (Path(__file__).parent / "test_lens_names.py").read_text(encoding="utf-8")
    bridged = re.findall(r'"', source.split("BRIDGED = [")[1].split("]")[0])
    hooked = re.findall(r'":', source.split("HOOKED = {")[1].split("}")[0])
    assert (
        f"{len(bridged) // 2}\narchitectures against TransformerBridge, {len(hooked)} against HookedTransformer" in PAGE
    )
