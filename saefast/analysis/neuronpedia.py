"""Neuronpedia: the JSON that its server takes, 128 features in a call, and the folder that it imports whole SAEs from.

Fields and limits are those of hijohnnylin/neuronpedia: app/api/feature/upload-batch and app/api/source-set/new for the
first; prisma/schema.prisma, app/api/admin/import and utils/neuronpedia-utils (db_models) for the second.
Nothing is sent anywhere.
"""

import gzip
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saefast.analysis.excerpts import (
    BATCH,
    Bin,
    Excerpt,
    as_json,
    batches,
    bins,
    dataset,
    excerpts,
    histogram,
    logits,
    number,
    require_text,
)
from saefast.analysis.export_folder import whole_folder
from saefast.analysis.export_names import Names
from saefast.errors import InputError
from saefast.files import write_json
from saefast.latents.database import Latent, LatentsDB, LogitWeight
from saefast.latents.steps import Advance, nothing

UPLOAD, FOLDER = "neuronpedia", "neuronpedia-folder"
# What the server takes: the longest explanation, in UTF-16 units, as JavaScript counts; the largest bound of a bin; the
# largest number of a feature; tokens with a logit.
LONGEST_EXPLANATION, LARGEST_BOUND, LARGEST_INDEX, MOST_LOGITS = 512, 99_999_999, 10_000_000, 20
# The user that rows belong to in an instance of one's own, where DEFAULT_CREATOR_ID does not say otherwise there.
CREATOR = "clkht01d40000jv08hvalcvly"


def write_upload(
    db: LatentsDB, out: str | Path, latents: Sequence[int], names: Names, advance: Advance = nothing
) -> int:
    """Writes source-set.json, the body of a call of /api/source-set/new, and batch-0.json and on, each the body of one
    of /api/feature/upload-batch.

    A person's labels are the explanations. Latents without a text that they fire on are left out: the server refuses
    them.

    Returns:
        How many latents were written.

    Raises:
        InputError: no text, no name for the model or the layer, more latents than the server counts, `out` is taken.
    """
    require_text(db, UPLOAD)
    _check_numbers(latents)
    model, source, set_name = names.neuronpedia_model, names.source, names.set_name
    written = 0
    with whole_folder(out, UPLOAD, db) as folder:
        about = f"{db.n_latents} latents of {names.hook}"[:127]
        write_json(folder / "source-set.json", {"name": set_name, "modelId": model, "description": about})
        for batch, features in enumerate(_in_batches(_features(db, latents, advance))):
            body = {"modelId": model, "source": source, "features": features}
            (folder / f"batch-{batch}.json").write_text(as_json(body), encoding="utf-8")
            written += len(features)
        if not written:
            raise InputError(f"none of the latents asked for fires on a text: {UPLOAD} has nothing to hold")
    return written


def _check_numbers(latents: Sequence[int]) -> None:
    if max(latents, default=0) > LARGEST_INDEX:
        raise InputError(f"latent {max(latents)} is beyond Neuronpedia's largest number, {LARGEST_INDEX}: leave it out")


def _in_batches(features: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    waiting: list[dict[str, Any]] = []
    for feature in features:
        waiting.append(feature)
        if len(waiting) == BATCH:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _features(db: LatentsDB, latents: Sequence[int], advance: Advance) -> Iterator[dict[str, Any]]:
    """What the server takes of each latent that has a text."""
    for batch in batches(latents):
        for latent in db.latents(batch):
            found = excerpts(db, latent.latent)
            if found:
                yield _feature(db, latent, found)
        advance(len(batch))


def _feature(db: LatentsDB, latent: Latent, found: list[Excerpt]) -> dict[str, Any]:
    parts, weights = bins(db, latent), logits(db, latent.latent)
    return {
        "index": latent.latent,
        "density": latent.density,
        "topLogits": _logits(weights.raised),
        "bottomLogits": _logits(weights.lowered),
        "explanations": [{"text": explanation(latent)}] if latent.label else [],
        "activations": [
            {"tokens": one.tokens, "values": one.values, **_quantile(parts[one.part])} for one in found
        ],
    }  # fmt: skip


def _logits(weights: list[LogitWeight]) -> list[dict[str, Any]]:
    return [{"token": one.text, "value": number(one.value)} for one in weights[:MOST_LOGITS]]


def _quantile(of: Bin) -> dict[str, float | None]:
    """The bin, as far as the server takes it: a share of -1, for the strongest, and bounds too large are left open."""
    if of.high > LARGEST_BOUND:
        return {"quantileMin": None, "quantileMax": None, "quantileFraction": None}
    return {"quantileMin": of.low, "quantileMax": of.high, "quantileFraction": of.share if of.share >= 0 else None}


def explanation(latent: Latent) -> str:
    """A label, cut where Neuronpedia takes no more of it."""
    units = latent.label.encode("utf-16-le")
    if len(units) <= 2 * LONGEST_EXPLANATION:
        return latent.label
    told = f"the label of latent {latent.latent} is cut to the {LONGEST_EXPLANATION} characters Neuronpedia takes"
    warnings.warn(told, RuntimeWarning, stacklevel=2)
    # Half of a character of two units is left out.
    return units[: 2 * (LONGEST_EXPLANATION - 1)].decode("utf-16-le", "ignore") + "…"


def write_folder(
    db: LatentsDB, out: str | Path, latents: Sequence[int], names: Names, advance: Advance = nothing
) -> int:
    """Writes {model}/{layer}-{set}/ with release, model, sourceset and source.jsonl, and batches of features,
    activations and a person's labels (explanations/) as .jsonl.gz.

    A latent that fired on nothing is a feature without activations. Its most similar latents are topkCosSim*.

    Returns:
        How many latents were written.

    Raises:
        InputError: no text, no name for the model or the layer, `out` is taken.
    """
    require_text(db, FOLDER)
    _check_numbers(latents)
    rows = _Rows(db, names)
    with whole_folder(out, FOLDER, db) as folder:
        place = folder / names.neuronpedia_model / names.source
        place.mkdir(parents=True)
        for name, row in rows.about().items():
            _write_lines(place / f"{name}.jsonl", [row])
        for number_of_batch, batch in enumerate(batches(latents)):
            for name, batch_rows in rows.of(db.latents(batch)).items():
                # An import reads the columns from the first line: there has to be one.
                if batch_rows:
                    (place / name).mkdir(exist_ok=True)
                    _write_lines(place / name / f"batch-{number_of_batch}.jsonl.gz", batch_rows)
            advance(len(batch))
    return len(latents)


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSON, a row on each line; packed where the name says so, without the time, so that equal rows are equal files."""
    data = "".join(f"{as_json(row)}\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, 5, mtime=0) if path.suffix == ".gz" else data)


class _Rows:
    """Rows of Neuronpedia's tables."""

    def __init__(self, db: LatentsDB, names: Names) -> None:
        self.db = db
        self.names = names
        self.model, self.source, self.set_name = names.neuronpedia_model, names.source, names.set_name
        digest = db.meta["sae"]["digest"]
        # Ids are 25 characters of letters and digits and unlike those of any other export.
        self._prefix = "c" + hashlib.sha256(f"{self.model} {self.source} {digest}".encode()).hexdigest()[:14]
        self._ids = 0
        self.own = {"creatorId": CREATOR, "createdAt": db.meta["built"]}

    def about(self) -> dict[str, dict[str, Any]]:
        db, model, name = self.db, self.model, self.set_name
        n_tokens = db.query("SELECT max(n) FROM sequences")[0][0]
        of_set = {"modelId": model, "visibility": "PUBLIC", "hasDashboards": True, **self.own}
        release = {"name": name, "description": name, "descriptionShort": name, "creatorName": "saefast", "urls": []}
        ids = {"id": model, "displayName": model, "displayNameShort": model, "instruct": model.endswith("-it")}
        data = {"num_prompts": db.meta["n_sequences"], "num_tokens_in_prompt": n_tokens, "dataset": dataset(db)}
        return {
            "release": {**release, "visibility": "PUBLIC", **self.own},
            "model": {**ids, "layers": 0, "neuronsPerLayer": 0, "owner": "", "visibility": "PUBLIC", **self.own},
            "sourceset": {
                **of_set, "name": name, "description": f"{db.n_latents} latents of {self.names.hook}", "type": "",
                "creatorName": "saefast", "urls": [], "releaseName": name,
            },
            "source": {**of_set, "id": self.source, "setName": name, **data},
        }  # fmt: skip

    def of(self, latents: Sequence[Latent]) -> dict[str, list[dict[str, Any]]]:
        """Rows of some latents, by the folder that they go to."""
        found = {latent.latent: excerpts(self.db, latent.latent) for latent in latents}
        return {
            "features": [self._neuron(latent) for latent in latents],
            "activations": [row for latent in latents for row in self._activations(latent, found[latent.latent])],
            "explanations": [self._explanation(latent) for latent in latents if latent.label],
        }

    def _neuron(self, latent: Latent) -> dict[str, Any]:
        db = self.db
        weights, (middles, heights) = logits(db, latent.latent), histogram(db, latent)
        similar = db.neighbours(latent.latent)
        return {
            **self._place(latent), **self.own, "sourceSetName": self.set_name,
            "maxActApprox": number(latent.max_act), "frac_nonzero": latent.density,
            "hasVector": False, "vector": [], "vectorLabel": None, "hookName": None,
            "topkCosSimIndices": [other.latent for other in similar],
            "topkCosSimValues": [number(other.value) for other in similar],
            "pos_str": [one.text for one in weights.raised],
            "pos_values": [number(one.value) for one in weights.raised],
            "neg_str": [one.text for one in weights.lowered],
            "neg_values": [number(one.value) for one in weights.lowered],
            "freq_hist_data_bar_values": middles, "freq_hist_data_bar_heights": heights,
            **{name: [] for name in _NOT_KNOWN},
        }  # fmt: skip

    def _activations(self, latent: Latent, found: list[Excerpt]) -> Iterator[dict[str, Any]]:
        parts = bins(self.db, latent) if found else []
        for one in found:
            largest, part = max(one.values), parts[one.part]
            yield {
                "id": self._id(), **self._place(latent), **self.own, "tokens": one.tokens, "values": one.values,
                "maxValue": largest, "maxValueTokenIndex": one.values.index(largest), "minValue": min(one.values),
                "binMin": part.low, "binMax": part.high, "binContains": part.share, "qualifyingTokenIndex": one.peak,
                "dfaValues": [], "dfaTargetIndex": None, "dfaMaxValue": None, "lossValues": [],
                "logitContributions": None, "dataIndex": None, "dataSource": None,
            }  # fmt: skip

    def _explanation(self, latent: Latent) -> dict[str, Any]:
        said = {"description": latent.label, "authorId": CREATOR, "createdAt": self.own["createdAt"]}
        return {"id": self._id(), **self._place(latent), **said}

    def _place(self, latent: Latent) -> dict[str, str]:
        return {"modelId": self.model, "layer": self.source, "index": str(latent.latent)}

    def _id(self) -> str:
        self._ids += 1
        return f"{self._prefix}{self._ids:010x}"


# Columns of a feature that need all logits, or the model's neurons on all tokens: nothing is known of them.
_NOT_KNOWN = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_pearson", "correlated_neurons_l1", "correlated_features_indices", "correlated_features_pearson",
    "correlated_features_l1", "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist",
)  # fmt: skip
