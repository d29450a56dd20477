"""Evaluation of a finished run on rows it was never trained on; `saefast eval` prints what this returns.

`evaluate` streams rows through an SAE of any architecture; `evaluate_run` finds the run's own rows and language
model, and leaves eval.json and latents.safetensors in its folder.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from saefast import ambient
from saefast.analysis.crosscoder import CROSSCODER, PartMetrics, metrics_by_part
from saefast.analysis.latent_stats import LATENTS, write_latent_stats
from saefast.data.item_names import what_of
from saefast.data.mapped_source import MappedSource
from saefast.data.opening import HELDOUT, has_hooks, open_source
from saefast.data.provenance import recorded_data
from saefast.data.shards import HookEntry, ShardFolder
from saefast.data.source import TARGET, Batch, Source, X, first_bad_row, where_it_ends
from saefast.errors import InputError
from saefast.files import read_json, usable, write_json
from saefast.formats.opening import load
from saefast.harvest.harvested_model import OtherModel, causal_language_model, check_given, harvested_tokenizer
from saefast.harvest.hooks import find_hook
from saefast.harvest.kept import TokenChoice, multiple_of, norms_of
from saefast.harvest.language_models import unwrapped
from saefast.harvest.reharvest import harvest_again
from saefast.metrics.language_model import LM_METRICS, TokenBatch, batch_sequences, lm_scores, why_missing
from saefast.metrics.streaming import METRICS, Metric, Reconstruction, SAEMetrics, density_histogram
from saefast.models.outliers import FIRST_ROWS, Multiple, check_multiple, ordinary_rows
from saefast.models.sae import SAE, WEIGHTS, require_real
from saefast.places import Place
from saefast.training.checkpoint import list_steps
from saefast.training.progress import SILENT, read_metrics
from saefast.training.residual import Stack, stack_of, trained_on
from saefast.training.run_folder import CHECKPOINTS
from saefast.typed import typed

EVAL = "eval.json"
# Text that the spliced language model reads: its loss is then known to about 0.01 nats.
LM_TOKENS = 1 << 16
TOGETHER: dict[str, Metric] = {
    "fvu_before": Metric("Σ‖x−x̂₁‖² / Σ‖x−x̄‖², x̂₁ of the SAEs before this one", "as fvu"),
    "fvu_together": Metric("Σ‖x−x̂₁−x̂‖² / Σ‖x−x̄‖²", "Koriagin et al., arXiv 2507.12990, the sum"),
    "l0_before": Metric("mean over rows of #(f ≠ 0) of the SAEs before this one", "as l0"),
    "l0_together": Metric("the same of all", "as l0"),
}


class HasHooks(TypedDict):
    """index.json of a harvest, as far as it is read here."""

    hooks: list[HookEntry]


@dataclass
class Evaluation:
    """Figures of an SAE on held-out rows.

    Attributes:
        metrics: floats named as in `saefast.metrics.streaming.METRICS`.
        lm: floats named as in `saefast.metrics.language_model.LM_METRICS`, or empty.
        lm_left_out: why `lm` is empty, in one line.
        lm_missing: why single figures of `lm` are NaN, by their names.
        accumulated: the accumulators, with per-latent counts.
        together: of a residual SAE, floats named as in TOGETHER: how good all the SAEs are.
        about: n_rows, data, hook, and what else is known of the rows. Of "ordinary" rows: up to how many times the
            median distance from the centre, or None where all are, and how many rows are "far" beyond.
        parts: where several layers or models are reconstructed, what there is to say of each. metrics are of rows
            scaled as in training then, so that all of them count alike.
    """

    metrics: dict[str, float]
    accumulated: SAEMetrics
    about: dict[str, Any]
    together: dict[str, float] = field(default_factory=dict)
    lm: dict[str, float] = field(default_factory=dict)
    lm_left_out: str = ""
    parts: PartMetrics | None = None

    @property
    def lm_missing(self) -> dict[str, str]:
        return why_missing(self.lm)

    def to_dict(self) -> dict[str, Any]:
        """What eval.json holds. Figures that do not exist (NaN) are null; lm_missing says why."""
        sparsity = self.accumulated.sparsity
        edges, heights, never = density_histogram(sparsity.counts, sparsity.n_rows)
        formulas = METRICS | (LM_METRICS if self.lm else {}) | (CROSSCODER if self.parts else {})
        formulas |= TOGETHER if self.together else {}
        more = {} if self.parts is None else {"by_part": _json_numbers(self.parts.compute())}
        return more | {
            "about": self.about,
            "metrics": {name: _json_number(value) for name, value in self.metrics.items()},
            "together": {name: _json_number(value) for name, value in self.together.items()} or None,
            "lm": {name: _json_number(value) for name, value in self.lm.items()} or None,
            "lm_left_out": self.lm_left_out or None,
            "lm_missing": self.lm_missing,
            "density_histogram": {"log10_edges": edges, "latents": heights, "never_fired": never},
            "formulas": {name: metric._asdict() for name, metric in formulas.items()},
        }


class Pair(NamedTuple):
    """Rows x (B, d_in) on an SAE's device, and what they are to be mapped to, (B, d_out): x itself, or another."""

    x: Tensor
    target: Tensor


Batches = Iterable[Tensor | Mapping[str, Tensor]]


@typed
@ambient.plainly(grad=False)
def evaluate(
    sae: SAE,
    batches: Iterable[Any],
    describe: Callable[[int], str] | None = None,
    max_norm_multiple: float | Literal["auto"] | None = "auto",
) -> SAEMetrics:
    """Streams rows x (B, d_in) through the SAE.

    Args:
        batches: an iterable of such x, or of {"x": x, "target": what it is to be mapped to}, which every figure of the
            reconstruction is about then.
        describe: says where a row came from, by its number, for the error about one that is not finite.
        max_norm_multiple: up to how many times the median distance from the centre, both of the first FIRST_ROWS rows,
            a row is ordinary; None is any; "auto" as in TrainConfig. "fvu_ordinary" alone is without the others.

    Raises:
        InputError: a batch that is no tensor, of another width, or with NaN or inf.
    """
    place = None if describe is None else lambda row, _name: describe(row)
    return _evaluated(sae, _checked(sae, batches, place), max_norm_multiple)


def _evaluated(
    sae: SAE, rows: Iterator[Pair], max_norm_multiple: Multiple, parts: PartMetrics | None = None
) -> SAEMetrics:
    check_multiple(max_norm_multiple)
    first: list[Pair] = []
    n_rows = 0
    while n_rows < FIRST_ROWS and (pair := next(rows, None)) is not None:
        first.append(pair)
        n_rows += len(pair.x)
    levelled = _levelling(sae)
    targets = [levelled(pair.target) for pair in first]
    ordinary = ordinary_rows(torch.cat(targets), max_norm_multiple) if n_rows else None
    metrics = SAEMetrics(sae.config.n_latents, sae.device, ordinary)
    for x, target in chain(first, rows):
        x_hat, acts, idx = sae(x)
        seen = levelled(target), levelled(x_hat), acts, idx
        metrics.update(*seen)
        if parts is not None:
            parts.update(*seen)
    return metrics


def _levelling(sae: SAE) -> Callable[[Tensor], Tensor]:
    """Scales rows (B, d_out) as they were in training, where several layers or models lie side by side in them."""
    levels = sae.architecture.levels(dict(sae.named_buffers()))
    return lambda rows: rows if levels is None else rows * levels.to(rows.dtype)


def _checked(
    sae: SAE,
    batches: Batches,
    describe: Callable[[int, str], str] | None,
    stored: Callable[[str], torch.dtype | None] | None = None,
) -> Iterator[Pair]:
    """The batches on the SAE's device. describe: where a row of a tensor, by their number and name, came from. stored:
    the dtype that a tensor had before it was read in another."""
    seen = 0
    for drawn in ambient.drawn([batches] if isinstance(batches, Tensor | Mapping) else batches):
        batch = drawn if isinstance(drawn, Mapping) else {X: drawn}
        _check_batch(batch, seen, sae)
        rows = {name: part.to(sae.device) for name, part in batch.items()}
        for name, part in rows.items():
            if (bad := first_bad_row(part)) is not None:
                where = f": {describe(seen + bad, name)}" if describe else ""
                where += f"; drop or repair it{where_it_ends(part[bad], None if stored is None else stored(name))}"
                raise InputError(f"row {seen + bad} of the held-out rows holds NaN or inf{where}")
        yield Pair(rows[X], rows.get(TARGET, rows[X]))
        seen += len(rows[X])


def _check_batch(batch: Mapping[str, Any], seen: int, sae: SAE) -> None:
    if X not in batch or batch.keys() - {X, TARGET}:
        given = ", ".join(map(str, batch))
        raise InputError(f"the batch after {seen} rows has {given}: expected {X!r}, perhaps with {TARGET!r}")
    widths = {X: ("d_in", sae.config.d_in), TARGET: ("d_out", len(sae.b_dec))}
    for name, rows in batch.items():
        what, width = widths[name]
        if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.device.type == "meta":
            is_tensor = isinstance(rows, Tensor)
            found = f"is of shape {tuple(rows.shape)} on {rows.device}" if is_tensor else f"is a {type(rows).__name__}"
            of = "" if name == X else f" of {name!r}"
            raise InputError(f"the batch{of} after {seen} rows {found}: expected a tensor (B, {width})")
        require_real(name, rows)
        if rows.shape[1] != width:
            raise InputError(f"{name} has shape {tuple(rows.shape)} after {seen} rows: expected (B, {what} = {width})")
    if len({len(rows) for rows in batch.values()}) > 1:
        raise InputError(f"target has {len(batch[TARGET])} rows after {seen} rows, x {len(batch[X])}: expected as many")


@typed
@ambient.plainly(grad=False)
def evaluate_run(
    run: str | Path,
    data: Any = None,
    *,
    batch_size: int = 2048,
    lm_tokens: int = LM_TOKENS,
    max_norm_multiple: float | Literal["auto"] | None = "auto",
    write: bool = True,
    model: Any = None,
    tokenizer: Any = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluates the SAE in a run's folder on its held-out rows, and where its model is a language model, spliced in.

    Args:
        run: a folder with sae.safetensors.
        data: what to evaluate on, as open_source takes it; None is the data that the run says it was trained on.
        lm_tokens: about how much held-out text the language model reads; 0 leaves it out.
        max_norm_multiple: which rows are ordinary; see `evaluate`.
        progress: show a bar where rows have to be harvested first (a run that trained live).
        model: the language model that the rows were harvested from, or a folder or name that it loads from; None is the
            name that the harvest has. Its weights have to be those harvested: then digests agree.
        tokenizer: the one of the harvest, likewise; needed for harvests without digests alone.
        write: leave eval.json and latents.safetensors (per latent: counts, total_act, max_act) in the folder.

    Raises:
        InputError: no SAE there, its data is gone or of another width, nothing is held out, or a model or tokenizer
            that is given is not the one harvested. One that loads by name and is another leaves `lm` empty.
    """
    folder = usable(run)
    sae = load_finished(folder)
    model, tokenizer = unwrapped(model, tokenizer)
    source = run_source(folder, sae, data, progress, model, tokenizer)
    if isinstance(source, MappedSource) and source.folder is not None:
        # Better now than after all rows.
        check_given(source.folder.index, model, tokenizer)
    stack = stack_of(folder, sae)
    if stack.parts[0].sae.architecture.has_target and TARGET not in source.widths:
        raise InputError(
            f"{source.source_name} has no target besides x, and {folder} reconstructs one: name data that has both of "
            "what the run was trained on"
        )
    given = trained_on(source, stack)
    rows = _checked(sae, given.heldout(batch_size, dtype=sae.dtype), given.describe_heldout, given.stored_dtype)
    parts = metrics_by_part(sae)
    metrics = _evaluated(sae, rows, max_norm_multiple, parts)
    n_rows = metrics.reconstruction.n_rows
    if n_rows == 0:
        raise InputError(f"{source.source_name} holds nothing out: harvest with a heldout share, or pass other data")
    about = _about(folder, source, n_rows) | {"ordinary": _ordinary(metrics)}
    result = Evaluation(metrics.compute(), metrics, about, parts=parts)
    if stack.before is not None:
        result.together = _together(stack, stack.before, source.heldout(batch_size, sae.device, sae.dtype))
    if parts is not None:
        result.lm_left_out = "several places are reconstructed at once, and none of them can stand in alone"
    elif lm_tokens:
        _language_model(result, stack, source, lm_tokens, model, tokenizer)
    else:
        result.lm_left_out = "not asked for"
    if write:
        write_evaluation(folder, result)
    return result


def load_finished(run: Path) -> SAE:
    """The SAE of a run, or of a folder in any format, without gradients, on the GPU if there is one.

    Raises:
        InputError: there is none (yet); see `saefast.load`.
    """
    if not (run / WEIGHTS).exists() and list_steps(run / CHECKPOINTS):
        raise InputError(f"{run} is not trained to its end: go on with saefast train --out {run} --resume")
    return load(run, "cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)


def write_evaluation(folder: Path, result: Evaluation) -> None:
    """eval.json and latents.safetensors, each whole or not at all."""
    more = {} if result.parts is None else result.parts.latents()
    write_latent_stats(folder / LATENTS, result.accumulated.sparsity, more)
    write_json(folder / EVAL, result.to_dict())


def run_source(
    folder: Path, sae: SAE, data: Any = None, progress: bool = False, model: Any = None, tokenizer: Any = None
) -> Source:
    """The rows a run was trained on, as its config says, or `data`. Raises InputError where they are not to be had.

    A run that trained live has none until its model has read its text once more (harvest/reharvest.py), which is done
    here; progress shows a bar, model and tokenizer are harvest_again's.
    """
    kept = recorded_data(sae.config.metadata, folder)
    if data is not None:
        names: dict[str, Any] = {}
        if kept is not None and has_hooks(data):
            names = {"hook": kept.get("hook"), "hooks": kept.get("hooks")}
        elif kept is not None and isinstance(data, str | Path):
            names = {"keys": kept.get("keys")}
        elif kept is None and has_hooks(data):
            names = {"hook": _named_hook(sae.config.metadata, usable(data))}
        return open_source(data, d_in=sae.config.d_in, shuffle="mapped", **names)
    if kept is None:
        raise InputError(f"{folder} does not say what data it was trained on: name it with --data")
    if "live" in kept:
        harvest_again(folder, kept, progress, model, tokenizer)
    here = folder / kept["path"]
    if not here.exists():
        raise InputError(f"{here}, the data of {folder}, is gone: name where it is with --data")
    beside = tuple(folder / other for other in kept.get("beside", []))
    return open_source(
        (here, *beside) if beside else here,
        d_in=sae.config.d_in,
        hook=kept.get("hook"),
        hooks=kept.get("hooks"),
        key=kept.get("key"),
        keys=kept.get("keys"),
        heldout=kept.get("heldout", HELDOUT),
        shuffle="mapped",
    )


def _named_hook(metadata: dict[str, Any], data: Path) -> str | None:
    """The hook of a harvest that another library's SAE says it is of, where the harvest has it by that name."""
    if not (data / "index.json").is_file():
        return None
    hooks = read_json(data / "index.json", HasHooks)["hooks"]
    there = [name for hook in hooks for name in (hook["name"], hook["hf_name"])]
    return next((name for key in ("hook_name", "hf_hook_name") if (name := metadata.get(key)) in there), None)


def _about(folder: Path, source: Source, n_rows: int) -> dict[str, Any]:
    about: dict[str, Any] = {"sae": str(folder), "data": source.source_name, "heldout_rows": n_rows}
    written = TARGET if TARGET in source.widths else X
    widths = source.part_widths(written)
    if len(widths) > 1:
        named = source.hooks.get(written, ()) if isinstance(source, MappedSource) else ()
        about["parts"] = list(named) or [f"part {number}" for number in range(1, len(widths) + 1)]
    if TARGET in source.widths:
        hooks = source.hooks if isinstance(source, MappedSource) else {}
        about["maps"] = {name: " + ".join(hooks.get(name, (name,))) for name in (X, TARGET)}
    # What the run itself said at its end of latents that did not fire in training.
    with contextlib.suppress(InputError, IndexError):
        last = read_metrics(folder)[-1]
        about["training"] = {name: last[name] for name in ("tokens", "dead_share", *SILENT) if name in last}
    if isinstance(source, MappedSource) and source.folder is not None:
        index = source.folder.index
        about |= {key: index[key] for key in ("model", "text", "data", "kind", "ctx_len", "dropped") if key in index}
    return about


def _ordinary(metrics: SAEMetrics) -> dict[str, float | None]:
    """What was taken for an ordinary row, and how many were none."""
    found = metrics.reconstruction
    multiple = math.inf if found.ordinary is None else found.ordinary.multiple
    return {"max_norm_multiple": multiple if multiple < math.inf else None, "far": found.n_far}


def _together(stack: Stack, before: Stack, batches: Iterator[Batch]) -> dict[str, float]:
    """TOGETHER's figures, over batches of the rows that the first SAE was trained on."""
    errors, on = (Reconstruction(), Reconstruction()), [0, 0]
    for batch in batches:
        for i, some in enumerate((before, stack)):
            errors[i].update(batch.get(TARGET, batch[X]), some.x_hat(batch[X]))
            on[i] += int(some.l0(batch[X]).sum())
    names, n_rows = ("before", "together"), max(errors[0].n_rows, 1)
    return {f"fvu_{name}": found.compute()["fvu"] for name, found in zip(names, errors, strict=True)} | {
        f"l0_{name}": n / n_rows for name, n in zip(names, on, strict=True)
    }


def _language_model(
    result: Evaluation, stack: Stack, source: Source, lm_tokens: int, model: Any, tokenizer: Any
) -> None:
    """Fills result.lm, or says in result.lm_left_out why not."""
    device = stack.parts[0].sae.device
    try:
        mapped, folder = harvest_of_text(source)
        index = folder.index
        language_model = causal_language_model(index, model, device)
        result.lm = lm_scores(
            language_model,
            _places(language_model, mapped.hooks.get(TARGET, mapped.hooks[X])),
            lambda x: stack.x_hat(x.to(device)).to(x.device),
            _scored(mapped, lm_tokens, _choice(index, model, tokenizer)),
            (),
            _ordinary_rows(index, mapped),
            _places(language_model, mapped.hooks[X]),
        )
    except OtherModel as error:
        if model is not None or tokenizer is not None:
            raise
        result.lm_left_out = str(error)
    except InputError as error:
        result.lm_left_out = str(error)


def harvest_of_text(source: Source) -> tuple[MappedSource, ShardFolder]:
    """The source as what it is, with its folder. Raises InputError where it is no harvest of a language model."""
    if not (isinstance(source, MappedSource) and source.folder is not None):
        raise InputError("the data is not a harvest, so no model is known")
    if source.folder.kind != "text":
        raise InputError(f"the folder holds {what_of(source.folder.kind)}, not of text")
    return source, source.folder


def _choice(index: dict[str, Any], model: Any, tokenizer: Any) -> TokenChoice:
    """Which tokens the harvest kept rows of: the others keep their own activations, and no loss is counted at them."""
    if "special_ids" in index:
        return TokenChoice.from_index(index)
    return TokenChoice.from_index(index, harvested_tokenizer(index, tokenizer, model).all_special_ids)


def _places(model: Any, hooks: Sequence[str]) -> list[Place]:
    """Of hooks whose values lie side by side."""
    return [place for hook in hooks for place in find_hook(model, hook).places]


def _ordinary_rows(index: dict[str, Any], source: MappedSource) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Which rows x, target (n, D) the harvest's max_norm_multiple kept; None where that is all."""
    multiple, medians = index.get("max_norm_multiple"), index.get("median_norms", {})
    if multiple is None or any(hook not in medians for hooks in source.hooks.values() for hook in hooks):
        return None

    def kept(x: Tensor, target: Tensor) -> Tensor:
        near = [
            norms_of(part) <= multiple_of(multiple) * medians[hook]
            for name, rows in ((X, x), (TARGET, target))
            if name in source.hooks
            for part, hook in zip(rows.split(source.part_widths(name), 1), source.hooks[name], strict=True)
        ]
        return torch.stack(near).all(0)

    return kept


def _scored(source: MappedSource, n_tokens: int, choice: TokenChoice) -> Iterator[TokenBatch]:
    for batch in batch_sequences(_heldout_sequences(source, n_tokens), batch_size=8):
        _, kept = choice(batch.ids.numpy(), batch.mask.numpy())
        yield batch._replace(rows=torch.from_numpy(kept))


def _heldout_sequences(source: MappedSource, n_tokens: int) -> Iterator[Tensor]:
    """Token ids of held-out sequences, in order, until there are n_tokens."""
    seqs = [part.seq for part in source.held[X].segments if part.seq is not None]
    for seq in torch.cat(seqs).unique().tolist() if seqs else []:
        ids = source.tokens(seq)
        yield ids
        n_tokens -= len(ids)
        if n_tokens <= 0:
            return


def _json_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json_numbers(one) for name, one in value.items()}
    return [_json_numbers(one) for one in value] if isinstance(value, list) else _json_number(value)


def _json_number(value: float) -> float | None:
    return value if value == value else None
