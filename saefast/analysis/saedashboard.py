"""SAEDashboard: batch-{i}.json as its NeuronpediaRunner leaves them, for what reads these (jbloomAus/SAEDashboard 0.8).

Fields are those of sae_dashboard.neuronpedia.neuronpedia_dashboard. Lists that need every logit, or the model's neurons
on every token, are empty: they are of no latents.db.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saefast.analysis.excerpts import (
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
from saefast.latents.database import Latent, LatentsDB
from saefast.latents.steps import Advance, nothing

SAEDASHBOARD = "saedashboard"
_EMPTY = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1",
    "correlated_features_pearson", "logits_hist_data_bar_heights", "logits_hist_data_bar_values",
    "decoder_weights_dist", "vector",
)  # fmt: skip


def write_saedashboard(
    db: LatentsDB,
    out: str | Path,
    latents: Sequence[int],
    names: Names,
    advance: Advance = nothing,
) -> int:
    """Writes batch-0.json and on, 128 latents in each, and skipped_indexes.json with all latents that are in none.

    A latent without a text that it fires on is in none.

    Returns:
        How many latents were written.

    Raises:
        InputError: no text, no name for the model or the layer, `out` is taken.
    """
    require_text(db, SAEDASHBOARD)
    model, layer, sae_set = names.neuronpedia_model, names.layer_number, names.set_name
    alive = [latent for batch in batches(latents) for latent in _with_text(db, batch)]
    if not alive:
        raise InputError(f"none of the latents asked for fires on a text: {SAEDASHBOARD} has nothing to hold")
    head = {"model_id": model, "layer": layer, "sae_set": sae_set, "sae_id_suffix": None}
    shared = _shared(db)
    with whole_folder(out, SAEDASHBOARD, db) as folder:
        for i, batch in enumerate(batches(alive)):
            features = [feature(db, latent) | shared for latent in db.latents(batch)]
            (folder / f"batch-{i}.json").write_text(as_json({**head, "features": features}), encoding="utf-8")
            advance(len(batch))
        advance(len(latents) - len(alive))
        skipped = {"model_id": model, "layer": str(layer), "sae_set": sae_set, "log_sparsity": 0}
        left_out = sorted(set(range(db.n_latents)) - set(alive))
        text = as_json({**skipped, "skipped_indexes": left_out})
        (folder / "skipped_indexes.json").write_text(text, encoding="utf-8")
    return len(alive)


def _with_text(db: LatentsDB, latents: Sequence[int]) -> list[int]:
    """Those with an example in a context that has text."""
    marks = ", ".join("?" * len(latents))
    rows = db.query(
        "SELECT DISTINCT latent FROM examples JOIN contexts USING (context) "
        f"WHERE text != '' AND latent IN ({marks})",
        list(latents),
    )  # fmt: skip
    found = {row[0] for row in rows}
    return [latent for latent in latents if latent in found]


def _shared(db: LatentsDB) -> dict[str, Any]:
    """What the format repeats of every latent."""
    n_tokens = db.query("SELECT max(n) FROM sequences")[0][0]
    return {"n_prompts_total": db.meta["n_sequences"], "n_tokens_in_prompt": n_tokens, "dataset": dataset(db)}


def feature(db: LatentsDB, latent: Latent) -> dict[str, Any]:
    """A latent in SAEDashboard's fields."""
    parts, weights, (middles, heights) = bins(db, latent), logits(db, latent.latent), histogram(db, latent)
    activations = [
        {
            "bin_min": parts[one.part].low, "bin_max": parts[one.part].high, "bin_contains": parts[one.part].share,
            "tokens": one.tokens, "values": one.values, "qualifying_token_index": one.peak,
        }
        for one in excerpts(db, latent.latent)
    ]  # fmt: skip
    return {
        "feature_index": latent.latent,
        "neg_str": [one.text for one in weights.lowered],
        "neg_values": [number(one.value) for one in weights.lowered],
        "pos_str": [one.text for one in weights.raised],
        "pos_values": [number(one.value) for one in weights.raised],
        "frac_nonzero": latent.density,
        "freq_hist_data_bar_values": middles,
        "freq_hist_data_bar_heights": heights,
        "activations": activations,
        **{name: [] for name in _EMPTY},
    }
