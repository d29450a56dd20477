"""batch-{i}.json as SAEDashboard leaves them: every field, the numbers of latents.db, and its own reader."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latents_db import make_db
from odd_latents import ODD, dense, set_pieces

from saefast.analysis.excerpts import bins
from saefast.analysis.export_names import Names
from saefast.analysis.saedashboard import write_saedashboard
from saefast.errors import InputError
from saefast.latents.database import LatentsDB

# The arguments of its NeuronpediaDashboardFeature, and of an activation, which are its fields.
FIELDS = {
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices",
    "correlated_features_l1", "correlated_features_pearson", "neg_str", "neg_values", "pos_str", "pos_values",
    "frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights", "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values", "n_prompts_total", "n_tokens_in_prompt", "dataset", "activations",
    "decoder_weights_dist", "vector",
}  # fmt: skip
OF_AN_ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[LatentsDB, Path]:
    folder = tmp_path_factory.mktemp("db")
    path = make_db(folder, n_latents=300, n_sequences=40)
    db = LatentsDB(path)
    example = db.examples(5)[0]
    set_pieces(path, example.context.context, list(ODD[:10]))
    write_saedashboard(db, folder / "out", range(300), Names(db, layer=3, source_set="res"))
    return db, folder / "out"


def batches(folder: Path) -> list[dict[str, Any]]:
    n = len(list(folder.glob("batch-*.json")))
    return [json.loads((folder / f"batch-{i}.json").read_text(encoding="utf-8")) for i in range(n)]


def test_every_field_is_there_and_every_latent_once(exported: tuple[LatentsDB, Path]) -> None:
    db, folder = exported
    found = batches(folder)
    alive = [latent for (latent,) in db.query("SELECT latent FROM latents WHERE NOT dead ORDER BY latent")]
    assert [feature["feature_index"] for batch in found for feature in batch["features"]] == alive
    assert [len(batch["features"]) for batch in found] == [128, 128, len(alive) - 256]
    for batch in found:
        assert {name: value for name, value in batch.items() if name != "features"} == {
            "model_id": "made-up", "layer": 3, "sae_set": "res", "sae_id_suffix": None
        }  # fmt: skip
        for feature in batch["features"]:
            assert set(feature) == FIELDS
            assert (feature["n_prompts_total"], feature["n_tokens_in_prompt"]) == (40, 30)
            assert all(set(one) == OF_AN_ACTIVATION for one in feature["activations"])
    skipped = json.loads((folder / "skipped_indexes.json").read_text(encoding="utf-8"))
    assert sorted([*skipped["skipped_indexes"], *alive]) == list(range(300))


def test_numbers_are_those_of_the_database(exported: tuple[LatentsDB, Path]) -> None:
    db, folder = exported
    acts = np.concatenate(dense(db.path)[0])
    for feature in (one for batch in batches(folder) for one in batch["features"]):
        latent, column = feature["feature_index"], acts[:, feature["feature_index"]]
        assert feature["frac_nonzero"] == pytest.approx((column > 0).mean(), rel=1e-6)
        middles = np.array(feature["freq_hist_data_bar_values"])
        assert len(middles) == len(feature["freq_hist_data_bar_heights"]) == 50
        assert np.allclose(np.diff(middles), column.max() / 50, rtol=1e-4)
        assert middles[0] == pytest.approx(column.max() / 100, rel=1e-5)
        assert feature["freq_hist_data_bar_heights"] == db.histogram(latent).tolist()
        raised, lowered = db.logit_weights(latent)
        assert list(zip(feature["pos_str"], feature["pos_values"], strict=True)) == [
            (one.text, pytest.approx(one.value)) for one in raised
        ]
        assert list(zip(feature["neg_str"], feature["neg_values"], strict=True)) == [
            (one.text, pytest.approx(one.value)) for one in lowered
        ]
        for example, one in zip(db.examples(latent), feature["activations"], strict=True):
            assert "".join(one["tokens"]).replace("\ufffd", "\0") == "".join(example.context.pieces)
            assert one["values"][one["qualifying_token_index"]] == pytest.approx(example.act, rel=1e-6)
            if example.part == 0:
                assert (one["bin_min"], one["bin_contains"]) == (-1, -1)
                assert one["bin_max"] == pytest.approx(column.max(), rel=1e-6)
            else:
                assert one["bin_min"] - 1e-5 <= example.act <= one["bin_max"] + 1e-5


def test_bins_divide_all_rows(exported: tuple[LatentsDB, Path]) -> None:
    db, _ = exported
    acts = np.concatenate(dense(db.path)[0])
    for latent in db.latents(range(1, 300)):
        column = acts[:, latent.latent]
        if latent.dead:
            continue
        strongest, *parts = bins(db, latent)
        assert strongest == (-1, pytest.approx(column.max()), -1)
        assert sum(part.share for part in parts) == pytest.approx(1)
        assert [part.high for part in parts[1:]] == [part.low for part in parts[:-1]]
        edges = np.linspace(0, 1, 6)[::-1] * column.max()
        for part, high, low in zip(parts, edges[:-1], edges[1:], strict=True):
            assert (part.high, part.low) == (pytest.approx(high), pytest.approx(low, rel=1e-6))
            # Activations on an edge count above or below it, as rounding has it.
            surely, perhaps = ((column > low + d) & (column < high - d) for d in (1e-6, -1e-6))
            zeros = (column == 0).mean() if low == 0 else 0
            assert surely.mean() + zeros <= part.share + 1e-9
            assert part.share <= max(perhaps.mean(), surely.mean() + zeros) + 1e-9


def test_latents_asked_for_are_written_in_their_order(exported: tuple[LatentsDB, Path], tmp_path: Path) -> None:
    db, _ = exported
    assert write_saedashboard(db, tmp_path / "out", [9, 0, 4], Names(db)) == 2
    (batch,) = batches(tmp_path / "out")
    assert [feature["feature_index"] for feature in batch["features"]] == [9, 4]
    with pytest.raises(InputError, match="none of the latents asked for fires on a text"):
        write_saedashboard(db, tmp_path / "other", [0], Names(db))
    assert not (tmp_path / "other").exists()


@pytest.mark.peers
def test_its_own_reader_takes_every_batch(exported: tuple[LatentsDB, Path]) -> None:
    dashboard = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard")
    db, folder = exported
    for batch in batches(folder):
        read = dashboard.NeuronpediaDashboardBatch(**batch)
        assert (read.model_id, read.layer, read.sae_set) == ("made-up", 3, "res")
        for feature in read.features:
            latent = db.latent(feature.feature_index)
            assert feature.frac_nonzero == latent.density
            assert feature.activations[0].bin_max == pytest.approx(latent.max_act, rel=1e-6)
        assert json.loads(json.dumps(read.to_dict())) == batch
