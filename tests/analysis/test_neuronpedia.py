"""What is written for Neuronpedia: its server's rules, stated here once more, and the numbers of latents.db."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latents_db import make_db
from odd_latents import ODD, dense, set_acts, set_meta, set_pieces, written

from saefast.analysis.export_names import Names
from saefast.analysis.neuronpedia import write_folder, write_upload
from saefast.errors import InputError
from saefast.latents.database import LatentsDB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_db(tmp_path, n_latents=300, n_sequences=40)


def alive(db: LatentsDB) -> list[int]:
    return [latent for (latent,) in db.query("SELECT DISTINCT latent FROM examples ORDER BY latent")]


def bodies(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("batch-*.json"), key=lambda path: int(path.stem.partition("-")[2]))
    assert [path.name for path in files] == [f"batch-{i}.json" for i in range(len(files))]
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def units(text: str) -> int:
    """Characters as JavaScript counts them."""
    return sum(2 if ord(character) > 0xFFFF else 1 for character in text)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def check_body(body: dict[str, Any]) -> None:
    """The schema of the server's /api/feature/upload-batch, rule by rule."""
    assert set(body) == {"modelId", "source", "features"}
    assert body["modelId"] == body["modelId"].lower() != ""
    assert re.fullmatch(r"\d+-[a-z0-9-]+", body["source"])
    assert 1 <= len(body["features"]) <= 128
    assert len({feature["index"] for feature in body["features"]}) == len(body["features"])
    for feature in body["features"]:
        check_feature(feature)


def check_feature(feature: dict[str, Any]) -> None:
    assert isinstance(feature["index"], int)
    assert 0 <= feature["index"] <= 10_000_000
    assert 0 <= feature["density"] <= 1
    for side in ("topLogits", "bottomLogits"):
        assert len(feature[side]) <= 20
        assert all(one["token"] != "" and is_number(one["value"]) for one in feature[side])
    assert all(1 <= units(one["text"]) <= 512 for one in feature["explanations"])
    assert len(feature["activations"]) >= 1
    for activation in feature["activations"]:
        assert 1 <= len(activation["tokens"]) == len(activation["values"]) <= 1024
        assert all(isinstance(token, str) and token and "\0" not in token for token in activation["tokens"])
        assert all(is_number(value) for value in activation["values"])
        for name in ("quantileMin", "quantileMax"):
            assert activation[name] is None or activation[name] <= 99_999_999
        assert activation["quantileFraction"] is None or 0 <= activation["quantileFraction"] <= 1


@pytest.mark.parametrize("n", [1, 127, 128, 129])
def test_batches_hold_128_latents(path: Path, tmp_path: Path, n: int) -> None:
    db = LatentsDB(path)
    latents = [0, *alive(db)[:n]]  # 0 is dead
    assert write_upload(db, tmp_path / "out", latents, Names(db)) == n
    written = bodies(tmp_path / "out")
    for body in written:
        check_body(body)
        assert (body["modelId"], body["source"]) == ("made-up", "1-saefast-300")
    assert [len(body["features"]) for body in written] == [128] * (n // 128) + [n % 128] * (n % 128 > 0)
    assert [f["index"] for body in written for f in body["features"]] == latents[1:]


def test_numbers_are_those_of_the_database(path: Path, tmp_path: Path) -> None:
    db = LatentsDB(path)
    acts, _ = dense(path)
    rows = np.concatenate(acts)
    write_upload(db, tmp_path / "out", range(300), Names(db))
    for feature in (one for body in bodies(tmp_path / "out") for one in body["features"]):
        column = rows[:, feature["index"]]
        assert feature["density"] == pytest.approx((column > 0).mean(), rel=1e-6)
        top = [one for one in feature["activations"] if one["quantileMin"] == -1]
        assert max(max(one["values"]) for one in top) == pytest.approx(column.max(), rel=1e-7)
        contexts = {tuple(e.acts.tolist()): "".join(e.context.pieces) for e in db.examples(feature["index"])}
        for one in feature["activations"]:
            assert contexts[tuple(np.float32(one["values"]).tolist())] == "".join(one["tokens"])
            if one["quantileMin"] == -1:
                assert one["quantileFraction"] is None
                continue
            # Of all rows, those that the latent does not fire on in the lowest: as SAEDashboard counts.
            low, high, edge = one["quantileMin"], one["quantileMax"], 1e-5 * column.max()
            inside = ((column >= low - edge) & (column <= high + edge)).mean()
            surely = ((column >= low + edge) & (column <= high - edge)).mean()
            if low == 0:
                surely += (column == 0).mean()
            assert surely <= one["quantileFraction"] <= inside
            assert any(low - edge <= value <= high + edge and value > 0 for value in one["values"])


def test_labels_are_explanations_of_at_most_512_characters(path: Path, tmp_path: Path) -> None:
    db = LatentsDB(path)
    db.write_label(4, "crosses a bridge")
    db.write_label(5, "\U0001f600" * 300)
    db.write_label(6, "x" * 512)
    with pytest.warns(RuntimeWarning, match="label of latent 5 is cut to the 512"):
        write_upload(db, tmp_path / "out", [4, 5, 6, 7], Names(db))
    (body,) = bodies(tmp_path / "out")
    check_body(body)
    said = [feature["explanations"] for feature in body["features"]]
    assert said == [[{"text": "crosses a bridge"}], [{"text": "\U0001f600" * 255 + "…"}], [{"text": "x" * 512}], []]


def test_odd_text_and_huge_activations_stay_within_the_servers_rules(path: Path, tmp_path: Path) -> None:
    db = LatentsDB(path)
    latent = alive(db)[5]
    example = db.examples(latent)[0]
    n = example.context.stop - example.context.start
    set_pieces(path, example.context.context, ["", *ODD[: n - 2], ""])
    set_pieces(path, db.examples(latent)[1].context.context, [""] * n)
    set_acts(path, 3e9)
    with written(path) as raw:
        raw.execute("UPDATE tokens SET text = '' WHERE token = 3")
    acts = np.concatenate(dense(path)[0])[:, latent]
    write_upload(db, tmp_path / "out", range(300), Names(db))
    features = {f["index"]: f for body in bodies(tmp_path / "out") for f in body["features"]}
    for body in bodies(tmp_path / "out"):
        check_body(body)
    shown = features[latent]["activations"]
    assert len(shown) == len(db.examples(latent)) - 1  # the one without text
    text = "".join(example.context.pieces)
    assert "".join(shown[0]["tokens"]) != text
    assert any("<script>alert(1)</script>" in one["tokens"] for one in shown)
    assert max(shown[0]["values"]) == pytest.approx(acts.max(), rel=1e-7)
    # 6e9 is above the largest bound that the server takes.
    assert {one["quantileMax"] for one in shown} == {None}
    assert all(one["token"] for f in features.values() for one in f["topLogits"])


def test_a_character_of_several_tokens_is_one_with_the_strongest_of_them(path: Path, tmp_path: Path) -> None:
    db = LatentsDB(path)
    latent = alive(db)[7]
    example = db.examples(latent)[0]
    place = min(example.peak, 8)
    pieces = [f" {i}" for i in range(10)]
    pieces[place], pieces[place + 1] = "", "\u5927"
    set_pieces(path, example.context.context, pieces)
    write_upload(db, tmp_path / "out", [latent], Names(db))
    (body,) = bodies(tmp_path / "out")
    check_body(body)
    (shown,) = (one for one in body["features"][0]["activations"] if "\u5927" in one["tokens"])
    assert shown["tokens"] == [piece for piece in pieces if piece]
    merged = float(max(example.acts[place], example.acts[place + 1]))
    expected = [*example.acts[:place].tolist(), merged, *example.acts[place + 2 :].tolist()]
    assert np.float32(shown["values"]).tolist() == expected


def test_long_texts_are_cut_around_the_peak(tmp_path: Path) -> None:
    path = make_db(tmp_path, n_latents=60, n_sequences=2, length=3000)
    with written(path) as raw:
        raw.execute("DELETE FROM contexts")
        lengths = np.ones(3000, "<u2").tobytes()
        for sequence in (0, 1):
            raw.execute(
                "INSERT INTO contexts VALUES (?, ?, 0, 3000, ?, ?)", (1 + sequence, sequence, "x" * 3000, lengths)
            )
        raw.execute("UPDATE examples SET context = 1 + (context - 1) / 300")
    db = LatentsDB(path)
    write_upload(db, tmp_path / "out", range(60), Names(db))
    for feature in bodies(tmp_path / "out")[0]["features"]:
        check_feature(feature)
        for example, one in zip(db.examples(feature["index"]), feature["activations"], strict=True):
            assert len(one["values"]) == 1024
            assert np.float32(example.act) in np.float32(one["values"])


def test_names_come_from_the_sae_and_can_be_given(path: Path, tmp_path: Path) -> None:
    db = LatentsDB(path)
    names = Names(db, model_id="HuggingFaceTB/SmolLM2-135M", layer=7, source_set="res-8k")
    write_upload(db, tmp_path / "out", [1, 2], names)
    (body,) = bodies(tmp_path / "out")
    assert (body["modelId"], body["source"]) == ("smollm2-135m", "7-res-8k")
    about = json.loads((tmp_path / "out" / "source-set.json").read_text(encoding="utf-8"))
    assert about == {"name": "res-8k", "modelId": "smollm2-135m", "description": "300 latents of layers.1"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source_set": "Res 8k"}, "--source-set is 'Res 8k': expected lower-case"),
        ({"source_set": "a--b"}, "--source-set"),
        ({"source_set": "neurons"}, "--source-set"),
        ({"source_set": ""}, "--source-set"),
        ({"model_id": ".."}, "no id of a model"),
        ({"model_id": " "}, "expected --model-id"),
        ({"layer": -1}, "--layer is -1"),
    ],
)
def test_names_that_the_server_refuses_are_refused(
    path: Path, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    db = LatentsDB(path)
    for write in (write_upload, write_folder):
        with pytest.raises(InputError, match=message):
            write(db, tmp_path / "out", [1], Names(db, **given))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("layers.15", 15),
        ("blocks.3.hook_resid_post", 3),
        ("transformer.h.11.mlp", 11),
        ("gpt2.wte", None),
        (None, None),
    ],
)
def test_the_layer_is_the_number_in_the_hooks_name(path: Path, hook: str | None, layer: int | None) -> None:
    set_meta(path, "sae", json.dumps({"digest": "d", "model": None, "hook": hook}))
    names = Names(LatentsDB(path))
    if layer is not None:
        assert names.layer_number == layer
    else:
        with pytest.raises(InputError, match=r"--layer|hook_name"):
            _ = names.layer_number
    with pytest.raises(InputError, match="does not say which model it is of: expected --model-id"):
        _ = names.neuronpedia_model


def test_what_is_no_logit_is_not_called_one(path: Path, tmp_path: Path) -> None:
    set_meta(path, "logits", '{"what": "embedding", "why": "the model has no unembedding"}')
    db = LatentsDB(path)
    write_upload(db, tmp_path / "out", range(300), Names(db))
    assert all(f["topLogits"] == f["bottomLogits"] == [] for body in bodies(tmp_path / "out") for f in body["features"])


def test_rows_without_text_are_refused(path: Path, tmp_path: Path) -> None:
    db = LatentsDB(path)
    with pytest.raises(InputError, match="none of the latents asked for fires on a text"):
        write_upload(db, tmp_path / "out", [0], Names(db))
    with written(path) as raw:
        raw.execute("UPDATE contexts SET text = '', lengths = zeroblob(length(lengths))")
    with pytest.raises(InputError, match="holds no text"):
        write_upload(db, tmp_path / "out", [1], Names(db))
    set_meta(path, "kind", '"image"')
    set_meta(path, "unit", '"patches"')
    for write in (write_upload, write_folder):
        with pytest.raises(InputError, match="is of patches"):
            write(LatentsDB(path), tmp_path / "out", [1], Names(db))
    assert not (tmp_path / "out").exists()


def lines(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    assert text.endswith("\n")
    assert "\\u0000" not in text
    return [json.loads(line) for line in text[:-1].split("\n")]


def test_the_folder_holds_every_latent_and_example(path: Path, tmp_path: Path) -> None:
    db = LatentsDB(path)
    db.write_label(9, "rivers")
    assert write_folder(db, tmp_path / "out", range(300), Names(db)) == 300
    place = tmp_path / "out" / "made-up" / "1-saefast-300"
    release, model, sourceset, source = (
        lines(place / f"{name}.jsonl")[0] for name in ("release", "model", "sourceset", "source")
    )
    # What the tables refer to in each other.
    assert sourceset["releaseName"] == release["name"]
    assert {sourceset["modelId"], source["modelId"]} == {model["id"]}
    assert source["setName"] == sourceset["name"]
    assert source["id"] == "1-saefast-300"
    assert (source["num_prompts"], source["num_tokens_in_prompt"]) == (40, 30)
    features = [row for i in range(3) for row in lines(place / "features" / f"batch-{i}.jsonl.gz")]
    activations = [row for i in range(3) for row in lines(place / "activations" / f"batch-{i}.jsonl.gz")]
    assert [row["index"] for row in features] == [str(i) for i in range(300)]
    assert {(row["modelId"], row["layer"], row["sourceSetName"]) for row in features} == {
        ("made-up", "1-saefast-300", "saefast-300")
    }
    assert len({row["id"] for row in activations}) == len(activations)
    assert all(re.fullmatch("[a-z0-9]{25}", row["id"]) for row in activations)
    assert len(activations) == db.query("SELECT count(*) FROM examples")[0][0]
    acts = np.concatenate(dense(path)[0])
    for row in features:
        column = acts[:, int(row["index"])]
        assert row["maxActApprox"] == pytest.approx(column.max(), rel=1e-7)
        assert sum(row["freq_hist_data_bar_heights"]) == (column > 0).sum()
        assert len(row["freq_hist_data_bar_values"]) == (50 if column.any() else 0)
        assert row["topkCosSimIndices"] == [other.latent for other in db.neighbours(int(row["index"]))]
    for row in activations:
        assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]]
        assert len(row["tokens"]) == len(row["values"])
        assert (row["binMin"] == -1) == (row["binContains"] == -1)
        assert row["values"][row["qualifyingTokenIndex"]] > 0
    (explained,) = lines(place / "explanations" / "batch-0.jsonl.gz")
    assert (explained["index"], explained["description"]) == ("9", "rivers")


def test_a_batch_of_dead_latents_has_no_file_of_activations(path: Path, tmp_path: Path) -> None:
    db = LatentsDB(path)
    write_folder(db, tmp_path / "out", [0], Names(db))
    place = tmp_path / "out" / "made-up" / "1-saefast-300"
    assert [row["frac_nonzero"] for row in lines(place / "features" / "batch-0.jsonl.gz")] == [0]
    assert not (place / "activations").exists()
    assert not (place / "explanations").exists()


def test_the_same_database_gives_the_same_files(path: Path, tmp_path: Path) -> None:
    db = LatentsDB(path)
    for write in (write_upload, write_folder):
        both = []
        for _ in range(2):
            write(db, tmp_path / "out", range(20), Names(db))
            files = sorted(p for p in (tmp_path / "out").rglob("*.json*") if "export" not in p.name)
            both.append({file.relative_to(tmp_path): file.read_bytes() for file in files})
        assert both[0] == both[1] != {}
        for file in sorted((tmp_path / "out").rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()


# Columns of the tables that the folder is imported into (prisma/schema.prisma). A line may leave out those with a
# default; others are dropped on the way.
NEURON = set(
    "modelId layer index sourceSetName creatorId createdAt maxActApprox hasVector vector vectorLabel "  # noqa: SIM905
    "vectorDefaultSteerStrength hookName topkCosSimIndices topkCosSimValues neuron_alignment_indices "
    "neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices correlated_neurons_pearson "
    "correlated_neurons_l1 correlated_features_indices correlated_features_pearson correlated_features_l1 neg_str "
    "neg_values pos_str pos_values frac_nonzero freq_hist_data_bar_heights freq_hist_data_bar_values "
    "logits_hist_data_bar_heights logits_hist_data_bar_values decoder_weights_dist".split()
)
ACTIVATION = set(
    "id tokens dataIndex index layer modelId dataSource maxValue maxValueTokenIndex minValue values dfaValues "  # noqa: SIM905
    "dfaTargetIndex dfaMaxValue zQIndices zKIndices zValues creatorId createdAt lossValues logitContributions binMin "
    "binMax binContains qualifyingTokenIndex".split()
)
EXPLANATION = set("id modelId layer index description authorId notes typeName explanationModelName createdAt".split())  # noqa: SIM905
NEEDED = {
    "features": {"modelId", "layer", "index"},
    "activations": set(
        "id tokens index layer modelId maxValue maxValueTokenIndex minValue values creatorId".split()  # noqa: SIM905
    ),
    "explanations": {"id", "modelId", "layer", "index", "description", "authorId"},
}


def test_rows_of_the_folder_are_columns_of_its_tables(path: Path, tmp_path: Path) -> None:
    db = LatentsDB(path)
    db.write_label(9, "rivers")
    write_folder(db, tmp_path / "out", range(300), Names(db))
    place = tmp_path / "out" / "made-up" / "1-saefast-300"
    for name, columns in (("features", NEURON), ("activations", ACTIVATION), ("explanations", EXPLANATION)):
        rows = lines(place / name / "batch-0.jsonl.gz")
        assert NEEDED[name] <= set(rows[0]) <= columns
        # An import takes the columns of all from the first.
        assert all(set(row) == set(rows[0]) for row in rows)


@pytest.mark.peers
def test_its_own_client_would_send_the_same(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feature_request = pytest.importorskip("neuronpedia.requests.feature_request")
    np_feature = pytest.importorskip("neuronpedia.np_feature")
    np_activation = pytest.importorskip("neuronpedia.np_activation")
    np_explanation = pytest.importorskip("neuronpedia.np_explanation")
    db = LatentsDB(path)
    db.write_label(9, "rivers")
    write_upload(db, tmp_path / "out", range(300), Names(db))
    sent: list[dict[str, Any]] = []
    request = feature_request.FeatureRequest(api_key="none")
    monkeypatch.setattr(type(request), "send_request", lambda self, method, uri, json: sent.append(json))
    written = bodies(tmp_path / "out")
    for body in written:
        features = []
        for one in body["features"]:
            place = {"modelId": body["modelId"], "source": body["source"], "index": one["index"]}
            activations = [np_activation.Activation(**place, **activation) for activation in one["activations"]]
            explanations = [np_explanation.Explanation(**place, text=said["text"]) for said in one["explanations"]]
            weights = [[np_feature.Logit(**logit) for logit in one[side]] for side in ("topLogits", "bottomLogits")]
            features.append(np_feature.Feature(
                **place, density=one["density"], top_logits=weights[0], bottom_logits=weights[1],
                explanations=explanations, activations=activations,
            ))  # fmt: skip
        request.upload_batch(body["modelId"], body["source"], features)
        for one in body["features"]:
            # What the client adds to a text that it knows no method of.
            one["explanations"] = [{**said, "methodName": None, "modelName": None} for said in one["explanations"]]
    assert sent == written


@pytest.mark.peers
def test_its_own_client_reads_the_folders_activations(path: Path, tmp_path: Path) -> None:
    np_activation = pytest.importorskip("neuronpedia.np_activation")
    db = LatentsDB(path)
    write_folder(db, tmp_path / "out", range(300), Names(db))
    rows = lines(tmp_path / "out" / "made-up" / "1-saefast-300" / "activations" / "batch-0.jsonl.gz")
    checked = 0
    for row in rows:
        # Of the strongest, whose share the server has as -1, the client makes nothing.
        if row["binContains"] >= 0:
            read = np_activation.Activation.from_np_db_json({**row, "source": row["layer"]})
            assert (read.index, read.values, read.quantileMax) == (int(row["index"]), row["values"], row["binMax"])
            checked += 1
    assert checked
