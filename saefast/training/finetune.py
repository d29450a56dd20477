"""finetune(): a trained SAE is trained on a little, so that the language model around it predicts as it did before.

The loss of a batch of text is

    (1 - kl_share) · R  +  kl_share · (R / KL) · KL  +  what else the architecture adds,

R the reconstruction's part of the loss in training, KL = mean over the tokens that have rows of KL(clean ‖ spliced),
the next-token distributions of the model as it is and with x̂ in place of x. R / KL is a number of each step, without a
gradient: both parts are as large as R, whatever the model, so that learning rates and penalties of training still fit
(Karvonen 2025, arXiv 2503.17272; a loss of KL alone is Braun et al. 2024, arXiv 2405.12241).
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from saefast import ambient
from saefast.data.source import TARGET, Batch, X, first_bad_row, joined, n_rows_of
from saefast.engines.autograd import AutogradEngine, Losses
from saefast.engines.config import TrainConfig
from saefast.engines.engine import StepStats
from saefast.errors import InputError
from saefast.files import usable, write_json
from saefast.harvest.config import HarvestConfig
from saefast.harvest.harvester import Harvester
from saefast.harvest.language_models import unwrapped
from saefast.harvest.reading import ReadBatch, Reading, cut, folder_of, harvested
from saefast.metrics.divergence import mean_kl
from saefast.models.sae import SAE, load
from saefast.training import checkpoint, run_folder
from saefast.training.api import stop_signals
from saefast.training.feed import input_scale
from saefast.training.finetune_config import MOST_TOKENS, Chosen, FinetuneConfig, chosen, recipe
from saefast.training.left_out import LeftOut
from saefast.training.loop import Line, Stopped, fold
from saefast.training.progress import MetricsLog, bar
from saefast.training.spliced_model import Clean, SplicedModel, own_hooks
from saefast.typed import typed

# What a finetuned SAE's metadata says of it, and the file beside it with the settings.
FINETUNED, RECORD = "finetuned", "finetune.json"
# Rows by which the scale of the inputs, and which of them are ordinary, is judged.
FIRST_ROWS = 2048
# Batches in a row that may have no row to train on.
MOST_EMPTY = 100


class _State(TypedDict):
    """What a checkpoint holds."""

    settings: dict[str, Any]
    step: int
    # Latents a token that the run aims at.
    k: int
    # Batches of text, those without rows included.
    drawn: int
    tokens: int
    seconds: float
    scale: float
    target_scale: float
    # What depends on the scale, as it is trained.
    scaled: dict[str, Tensor]
    left_out: dict[str, Any]
    engine: dict[str, Any]


class _Rows(NamedTuple):
    """A batch of text with what the untouched model makes of it: x (n, d_in) and target (n, d_out) at the positions
    where (B, T) bool."""

    batch: ReadBatch
    clean: Clean
    where: Tensor
    x: Tensor
    target: Tensor

    def kept(self, keep: Tensor) -> "_Rows":
        """Those of the rows for which keep (n,) bool says so."""
        where = self.where.clone()
        where[self.where] = keep.to(where.device)
        return _Rows(self.batch, self.clean, where, self.x[keep], self.target[keep])


@typed
@ambient.plainly(grad=True)
def finetune(
    sae: SAE,
    model: Any,
    text: Any,
    config: FinetuneConfig | None = None,
    out_dir: str | Path | None = None,
    *,
    hook: str | Sequence[str] | None = None,
    target_hook: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    harvest: HarvestConfig | None = None,
    train_config: TrainConfig | None = None,
    resume: bool = False,
    keep_checkpoints: int = 2,
    progress: bool | None = None,
    on_log: Callable[[Line], None] | None = None,
) -> SAE:
    """Fine-tunes an SAE spliced into a language model; see the module's docstring for the loss.

    The SAE given stays as it is. Weights are trained in float32 at least, by Adam with dense gradients: four times the
    SAE's size in memory. Biases and the like are trained in units of the activations' usual size, so that the learning
    rate means the same for any model.

    Args:
        sae: of any architecture that the engine "autograd" trains.
        model: a causal language model of transformers, with its head. It is in eval mode meanwhile, and its weights get
            no gradients.
        text: a folder of `harvest` with the model's text, whose training tokens are read again as they were; or what
            `open_text` takes, cut as `harvest` says, without the documents that it holds out.
        config: settings; what they leave open is chosen.
        out_dir: gets sae.safetensors, config.json, finetune.json, metrics.jsonl and checkpoints; None keeps nothing.
        hook: where the SAE's rows are from, or several, side by side; None is the hook_name in the SAE's metadata.
        target_hook: where what it gives out belongs, where that is elsewhere (a transcoder); None is the metadata's
            hook_name_out, or `hook`.
        tokenizer: the model's; needed where the text is no harvest and the model has none itself.
        harvest: how text that is no harvest is cut and which tokens have rows.
        train_config: what the architecture's own settings of training are, where they are not the defaults
            (matryoshka_loss, threshold_decay ...).
        resume: go on from the newest checkpoint in out_dir, bit for bit as if nothing had happened; where there is
            none, begin.
        keep_checkpoints: how many to keep.
        progress: show a bar on stderr; None is only in a terminal.
        on_log: called with every line of metrics.

    Returns:
        A new SAE on the SAE's device, in its dtype.

    Raises:
        InputError: a model without logits, an SAE of rows of another width, text without a token to train on, an
            out_dir that holds something else, a checkpoint of another run, a diverged loss. What was saved stays.
        Stopped: after Ctrl-C or SIGTERM, once the step under way is done and saved.
    """
    config = FinetuneConfig() if config is None else config
    if keep_checkpoints < 1:
        raise InputError(f"keep_checkpoints is {keep_checkpoints}: expected at least 1")
    if resume and out_dir is None:
        raise InputError("resume is True but out_dir is None: give the folder of the run to go on with")
    folder = None if out_dir is None else usable(out_dir)
    model, tokenizer = unwrapped(model, tokenizer)
    through = SplicedModel(model, *_hooks(sae, hook, target_hook))
    with contextlib.ExitStack() as stack:
        if folder is not None:
            stack.enter_context(run_folder.locked(folder))
            run_folder.check_ours(folder)
            if not resume:
                run_folder.check_new(folder)
            stack.enter_context(run_folder.nothing_begun(folder, RECORD))
        reading = _reading(text, through, tokenizer, harvest, config)
        settled = chosen(config, sae.config, min(reading.n_tokens, MOST_TOKENS))
        stack.enter_context(through.attached())
        run = _begin(sae, through, reading, settled, train_config or TrainConfig(), folder if resume else None)
        run.on_log, run.keep = on_log, keep_checkpoints
        if folder is not None:
            run.open(folder)
            stack.callback(run.close)
        shown = stack.enter_context(bar(run.total_steps * settled.batch_tokens, run.tokens, progress))
        stop = stack.enter_context(stop_signals())
        while run.engine.step_count < run.total_steps:
            if stop.is_set():
                raise run.stopped()
            before = run.tokens
            line = run.step()
            shown.advance(run.tokens - before)
            if line is not None:
                shown.show(line)
        return run.finish()


def _hooks(sae: SAE, hook: Any, target: Any) -> tuple[Sequence[str], Sequence[str]]:
    if (n := len(sae.architecture.target_parts())) > 1:
        raise InputError(
            f"sae reconstructs {n} layers or models at once, none of which can stand in alone: fine-tuning through a "
            "model takes an SAE or a transcoder of one place"
        )
    return own_hooks(sae, hook, target)


def _reading(
    text: Any, through: SplicedModel, tokenizer: Any, harvest: HarvestConfig | None, config: FinetuneConfig
) -> Reading:
    n_tokens = MOST_TOKENS if config.n_tokens is None else config.n_tokens
    folder = folder_of(text)
    if folder is None:
        asked = dataclasses.replace(harvest or HarvestConfig(), hooks=through.every)
        return cut(Harvester(asked, model=through.model, tokenizer=tokenizer, text=text), n_tokens)
    if harvest is not None:
        raise InputError(f"harvest is given, but {folder.path} is a harvest already, with settings of its own")
    return harvested(folder, through.every, n_tokens)


def _begin(
    sae: SAE,
    through: SplicedModel,
    reading: Reading,
    config: Chosen,
    train: TrainConfig,
    resume_from: Path | None,
) -> "_Run":
    """A new run, or the one whose newest checkpoint lies in the folder `resume_from`."""
    plan = recipe(config, sae.config, train)
    settings: dict[str, Any] = {
        "finetune": config.to_dict(),
        "train": plan.to_dict(),
        "hooks": [through.hooks, through.targets],
        "text": reading.digest,
    }
    settings = json.loads(json.dumps(settings | {"sae": sae.config.to_dict()}))
    run = _Run(sae, through, reading, config, settings)
    found = None if resume_from is None else checkpoint.newest(resume_from / run_folder.CHECKPOINTS, _State)
    if found is None:
        run.begin(plan)
    else:
        run.restore(*found, plan)
    return run


@dataclass
class _Run:
    """Everything a run holds on to. tuned: the SAE under way, of inputs times `scale`."""

    sae: SAE
    through: SplicedModel
    reading: Reading
    config: Chosen
    settings: dict[str, Any]
    scale: float = 1.0
    target_scale: float = 1.0
    drawn: int = 0
    tokens: int = 0
    seconds: float = 0.0
    kl: Tensor | None = None
    folder: Path | None = None
    keep: int = 2
    log: MetricsLog | None = None
    on_log: Callable[[Line], None] | None = None
    saved_step: int = 0
    engine: AutogradEngine = field(init=False)
    left_out: LeftOut = field(init=False)

    def __post_init__(self) -> None:
        self.total_steps, self.k = self.config.steps, self.sae.config.k
        self.batches = self._text()
        self.left_out = LeftOut(self.config.max_norm_multiple)

    def begin(self, train: TrainConfig) -> None:
        """Measures the first rows, and puts the SAE into units of their size."""
        first = self._first_rows()
        # Powers of two, so that nothing is rounded on the way there and back.
        kind = "none" if self.sae.architecture.row_norm(first[X]) is not None else "median"
        scales = {name: 2.0 ** round(math.log2(input_scale(rows, kind))) for name, rows in first.items()}
        self.scale, self.target_scale = scales[X], scales.get(TARGET, scales[X])
        self.left_out.look_at(first)
        tuned = fold(_wide(self.sae), 1 / self.scale, 1 / self.target_scale)
        if tuned.architecture.pointwise is not None:
            # What pays for sparsity is held to k latents: to as many as it has.
            with torch.no_grad():
                l0 = float((tuned(first[X] * self.scale).acts > 0).sum(1).double().mean())
            self.k = min(max(round(l0), 1), self.sae.config.n_latents)
        self._take(tuned, train)

    def restore(self, path: Path, state: dict[str, Any], train: TrainConfig) -> None:
        """The run as it stood when the checkpoint at `path`, which holds `state`, was written."""
        if state["settings"] != self.settings:
            names = [name for name in self.settings if state["settings"].get(name) != self.settings[name]]
            raise InputError(f"{path} is of a run with another {', '.join(names)}: resume with its own, see {RECORD}")
        sae = load(path, self.sae.device, verify=False)
        sae.load_state_dict({name: value.clone() for name, value in sae.state_dict().items()}, assign=True)
        tuned = fold(sae, 1 / state["scale"], 1 / state["target_scale"])
        with torch.no_grad():
            for name, value in tuned.state_dict().items():
                if name in state["scaled"]:
                    value.copy_(state["scaled"][name])
        self.k = state["k"]
        self._take(tuned, train)
        self.engine.load_state_dict(state["engine"])
        self.scale, self.target_scale = state["scale"], state["target_scale"]
        self.drawn, self.tokens, self.seconds = state["drawn"], state["tokens"], state["seconds"]
        self.left_out.load_state_dict(state["left_out"], self.sae.device)
        self.saved_step = state["step"]
        next(itertools.islice(self.batches, self.drawn, self.drawn), None)

    def _text(self) -> Iterator[ReadBatch]:
        """The batches from the first one on."""
        return self.reading.batches(self.config.batch_tokens, self.config.seed)

    def _take(self, tuned: SAE, train: TrainConfig) -> None:
        tuned.config = dataclasses.replace(tuned.config, k=self.k)
        self.tuned = tuned
        self.engine = AutogradEngine(tuned, train, self.total_steps)

    def _first_rows(self) -> Batch:
        """Rows of the run's first batches, unscaled."""
        found: list[Batch] = []
        for batch in itertools.islice(self._text(), MOST_EMPTY):
            found.append(self._named(self._rows(batch)))
            if sum(map(n_rows_of, found)) >= FIRST_ROWS:
                break
        if not any(map(n_rows_of, found)):
            raise self._without_rows()
        return joined(found)

    def _named(self, rows: _Rows) -> Batch:
        return {X: rows.x} | ({TARGET: rows.target} if self.through.maps else {})

    def _rows(self, batch: ReadBatch) -> _Rows:
        """A batch through the untouched model, and its rows but those that the harvest would leave out."""
        batch = batch.to(self.through.device)
        clean = self.through.clean(batch)
        parts = {hook: rows[batch.kept] for hook, rows in clean.rows.items()}
        x, target = (
            torch.cat([parts[hook] for hook in hooks], -1) for hooks in (self.through.hooks, self.through.targets)
        )
        shapes = self.sae.architecture.shapes()
        for rows, hooks, what, width in (
            (x, self.through.hooks, "takes", self.sae.config.d_in),
            (target, self.through.targets, "gives", shapes["b_dec"][0]),
        ):
            named = ", ".join(hooks)
            if rows.shape[-1] != width:
                raise InputError(
                    f"hook {named} gives rows of width {rows.shape[-1]}, the SAE {what} rows of {width}: name the hook "
                    "that it was trained on"
                )
            if first_bad_row(rows) is not None:
                raise InputError(
                    f"hook {named} gives NaN or inf for a token of {self.reading.name}, in {rows.dtype}: run the model "
                    "in bfloat16 or float32"
                )
        wide = torch.promote_types(self.sae.dtype, torch.float32)
        found = _Rows(batch, clean, batch.kept, *(rows.to(self.sae.device, wide) for rows in (x, target)))
        ordinary = self.reading.ordinary(parts)
        return found if ordinary is None else found.kept(ordinary.to(self.sae.device))

    def step(self) -> Line | None:
        """One update, with the line and the checkpoint due after it."""
        begun = time.perf_counter()
        found = self._next()
        x = found.x * self.scale
        target = found.target * self.target_scale if self.through.maps else None
        stats = self.engine.step(x, target, lambda losses: self._objective(losses, found))
        self.tokens += int(found.batch.mask.numel())
        self.seconds += time.perf_counter() - begun
        due = self.engine.step_count == self.total_steps or _due(self.engine.step_count, self.config.log_every)
        line = self._line(stats) if due else None
        if _due(self.engine.step_count, self.config.save_every):
            self.save()
        return line

    def _next(self) -> _Rows:
        """The next batch with rows to train on."""
        for _ in range(MOST_EMPTY):
            found = self._rows(next(self.batches))
            self.drawn += 1
            found = found.kept(~self.left_out.far(self._named(found)))
            if len(found.x):
                return found
        raise self._without_rows()

    def _without_rows(self) -> InputError:
        return InputError(
            f"no token of {MOST_EMPTY} batches of {self.reading.name} has a row to train on: give other text, or leave "
            "out less of it"
        )

    def _objective(self, losses: Losses, rows: _Rows) -> Tensor:
        """See the module's docstring."""
        x_hat, norm = losses.x_hat / self.target_scale, self.tuned.architecture.row_norm(rows.x)
        x_hat = (x_hat if norm is None else norm.undone(x_hat)).to(self.through.device)
        logits = self.through.spliced(rows.batch, rows.clean, rows.where, x_hat)
        kl = mean_kl(logits, rows.clean.logits, rows.where).to(losses.total.device)
        self.kl = kl.detach()
        share, size = self.config.kl_share, losses.reconstruction.detach()
        # An SAE that changes nothing at all has no divergence to weigh.
        weight = share * size / self.kl.clamp_min(torch.finfo(kl.dtype).tiny)
        return losses.total - share * losses.reconstruction + weight * kl

    def _line(self, stats: StepStats) -> Line:
        silent = self.engine.dead.silent(self.tokens)
        line: Line = {
            "step": self.engine.step_count,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "losses/overall_loss": float(stats.loss),
            "losses/kl": float(self.kl) if self.kl is not None else math.nan,
            "fvu": float(stats.fvu),
            "metrics/l0": float(stats.l0),
            "sparsity/silent_share": float(silent.share),
            "sparsity/silent_tokens": silent.tokens,
            "grad_norm": float(stats.grad_norm),
            "details/current_learning_rate": stats.lr,
            "details/total_steps": self.total_steps,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
        }
        if self.log is not None:
            with run_folder.writing(self.log.path):
                self.log.write(line)
        if self.on_log is not None:
            with ambient.theirs():
                self.on_log(line)
        return line

    def open(self, folder: Path) -> None:
        """Gives the run its folder, rid of what came after the checkpoint that it goes on from."""
        self.folder = folder
        with run_folder.writing(folder):
            run_folder.remove_leftovers(folder)
            checkpoint.prune(folder / run_folder.CHECKPOINTS, self.engine.step_count, self.keep)
            write_json(folder / RECORD, self.settings)
            self.log = MetricsLog(folder, after=self.engine.step_count)

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    def save(self) -> None:
        """A checkpoint of this step, unless there is one or nothing happened yet."""
        step = self.engine.step_count
        if self.folder is None or self.saved_step == step:
            return
        tensors = {name: value.detach() for name, value in self.tuned.state_dict().items()}
        scaled = self.tuned.architecture.rescaled(tensors, self.scale, self.target_scale)
        state: _State = {
            "settings": self.settings,
            "step": step,
            "k": self.k,
            "drawn": self.drawn,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "scale": self.scale,
            "target_scale": self.target_scale,
            "scaled": {name: tensors[name] for name in scaled},
            "left_out": self.left_out.state_dict(),
            "engine": self.engine.state_dict(),
        }
        with run_folder.writing(self.folder / run_folder.CHECKPOINTS):
            if self.log is not None:
                self.log.sync()
            checkpoint.save(self.folder / run_folder.CHECKPOINTS, step, self._served(), dict(state), self.keep)
        self.saved_step = step

    def stopped(self) -> Stopped:
        """Saves a run before its end; the exception to raise."""
        self.save()
        return Stopped(self.engine.step_count, self.folder, self._served(), "finetune")

    def finish(self) -> SAE:
        """The SAE in its final form, on disk too where there is a folder."""
        self.engine.finish()
        sae = self._served().to(self.sae.dtype)
        if self.folder is not None:
            with run_folder.writing(self.folder):
                sae.save_files(self.folder)
        return sae

    def _served(self) -> SAE:
        """The SAE as it stands, of raw inputs."""
        sae = fold(self.tuned, self.scale, self.target_scale)
        about = {"text": self.reading.name, **self.config.to_dict()}
        metadata = sae.config.metadata | {FINETUNED: about}
        sae.config = dataclasses.replace(sae.config, k=self.sae.config.k, metadata=metadata)
        return sae


def _wide(sae: SAE) -> SAE:
    """A copy in which small steps are not rounded away."""
    return copy.deepcopy(sae).to(torch.promote_types(sae.dtype, torch.float32))


def _due(step: int, every: int) -> bool:
    """Every so many steps; 0 is never."""
    return every > 0 and step % every == 0
