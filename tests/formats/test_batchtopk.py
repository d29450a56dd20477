"""Checkpoints of BatchTopK's and the Matryoshka SAEs' repositories, against what their code computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from their_files import D, K, L, assert_same, read_batchtopk, rows, there_and_back, write_batchtopk

import saefast
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

GROUPS = "[8, 24, 32]"
# Type, tensors besides, settings, and which of the two formats it is.
KINDS: dict[str, tuple[str, bool, dict[str, Any], str]] = {
    "vanilla": ("vanilla", False, {}, "batchtopk"),
    "topk": ("topk", False, {}, "batchtopk"),
    "topk, raw rows": ("topk", False, dict(input_unit_norm=False), "batchtopk"),
    "batchtopk": ("batchtopk", False, {}, "batchtopk"),
    "jumprelu": ("jumprelu", False, {}, "batchtopk"),
    "batchtopk with a threshold": ("batch-topk", True, {}, "matryoshka_sae"),
    "nested": ("global-matryoshka-topk", True, dict(group_sizes=GROUPS, input_unit_norm=False), "matryoshka_sae"),
    "nested, of another size": (
        "global-matryoshka-topk",
        True,
        dict(group_sizes=GROUPS, dict_size=12288),
        "matryoshka_sae",
    ),
}


def written(name: str, folder: Path) -> str:
    kind, threshold, settings, format = KINDS[name]
    write_batchtopk(folder, kind, {"threshold": torch.tensor(0.3)} if threshold else None, **settings)
    return format


@pytest.mark.parametrize("name", KINDS)
def test_theirs_and_back(name: str, tmp_path: Path) -> None:
    format = written(name, tmp_path / "run_5")
    sae, x = saefast.load(tmp_path / "run_5"), rows()
    assert sae.config.metadata["format"] == format
    assert sae.config.metadata["hook_name"] == "blocks.8.hook_resid_pre"
    assert_same(sae, read_batchtopk(tmp_path / "run_5"), x)
    there_and_back(sae, tmp_path / "again", format, read_batchtopk, x)
    read, wrote = (
        json.loads((tmp_path / folder / "config.json").read_text(encoding="utf-8")) for folder in ("run_5", "again")
    )
    same = read.keys() - {"sae_type", "dict_size"}
    assert {key: wrote[key] for key in same} == {key: read[key] for key in same}
    assert wrote["dict_size"] == L
    if "nested" in name:
        assert sae.config.matryoshka == (8, 32, 64)


def test_b_enc_is_not_used_where_they_do_not(tmp_path: Path) -> None:
    written("topk", tmp_path / "a")
    assert bool((torch.load(tmp_path / "a" / "sae.pt", weights_only=True)["b_enc"] != 0).any())
    sae = saefast.load(tmp_path / "a")
    assert bool((sae.b_enc == 0).all())
    with torch.no_grad():
        sae.b_enc[3] = 0.5
    with pytest.raises(InputError, match="b_enc is not 0, and topk in batchtopk's code adds none"):
        saefast.save(sae, tmp_path / "b", format="batchtopk")


def test_a_threshold_that_was_never_set(tmp_path: Path) -> None:
    write_batchtopk(tmp_path, "batch-topk", {"threshold": torch.tensor(0.0)})
    with pytest.warns(RuntimeWarning, match="has a threshold of 0, which was never set"):
        sae = saefast.load(tmp_path)
    assert_same(sae, read_batchtopk(tmp_path), rows())


def test_ours_without_a_place_for_the_threshold(tmp_path: Path) -> None:
    sae = SAE(SAEConfig(D, L, K, activation="batchtopk", metadata={"hook_name": "blocks.0.hook_mlp_out"}), seed=1)
    sae.threshold.fill_(0.25)
    assert saefast.save(sae, tmp_path / "a", format="batchtopk") == [
        "threshold = 0.25 is left out: batchtopk takes the best of a batch"
    ]
    assert saefast.save(sae, tmp_path / "b", format="matryoshka_sae") == []
    assert torch.equal(saefast.load(tmp_path / "b").encode(x := rows()), sae.encode(x))


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, dict(sae_type="gated"), "sae_type is 'gated', expected one of vanilla, topk, batchtopk, jumprelu"),
        ({}, dict(top_k="many"), r"config\.json: top_k"),
        ({"jumprelu.log_threshold": torch.zeros(L)}, {}, r"the file has jumprelu\.log_threshold"),
        (
            {"threshold": torch.tensor(0.1)},
            dict(sae_type="global-matryoshka-topk", group_sizes="[8, 8]"),
            "group_sizes is",
        ),
        ({"threshold": torch.tensor(0.1)}, dict(sae_type="global-matryoshka-topk"), "group_sizes is None"),
    ],
)
def test_bad_files(changes: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_batchtopk(tmp_path, **(dict(sae_type="topk") | settings), tensors=changes)
    with pytest.raises(InputError, match=message):
        saefast.load(tmp_path)


def test_a_type_whose_tensors_are_missing(tmp_path: Path) -> None:
    write_batchtopk(tmp_path, "topk")
    config = tmp_path / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"topk"', '"jumprelu"'), encoding="utf-8")
    with pytest.raises(InputError, match=r"sae_type is 'jumprelu', but the file lacks jumprelu\.log_threshold"):
        saefast.load(tmp_path)
