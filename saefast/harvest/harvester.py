"""A language model, a text and the modules to listen to, made into a stream of rows."""

from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saefast.data.shard_writer import ShardWriter
from saefast.errors import InputError
from saefast.forward import vocabulary_size
from saefast.harvest.config import HarvestConfig, check_config
from saefast.harvest.documents import Fingerprint, skip_documents
from saefast.harvest.kept import (
    DROPPED,
    NORM_TOKENS,
    FirstPositions,
    TokenChoice,
    finite_rows,
    norms_of,
    ordinary_norms,
    token_ids,
)
from saefast.harvest.language_models import (
    DEFAULT_MODEL,
    context_limit,
    load_tokenizer,
    model_class,
    require_token_ids,
    unwrapped,
)
from saefast.harvest.reader import HarvestBatch, Reader, without_first
from saefast.harvest.sequences import Sequencer, Window, batches_of, pad
from saefast.harvest.text import Text, open_text
from saefast.harvest.workers import in_order

_MOST_POSITIONS = 1 << 15


class _Job(NamedTuple):
    """Sequences of a window to run together, their split, how many of window.order() are run with them, and how many
    of them an earlier call has harvested already."""

    window: Window
    numbers: list[int]
    split: str
    done: int
    known: int


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
            usual = ordinary_norms(rows, self.limits())
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
        return without_first(batch, known)


def _where(window: Window, numbers: list[int], place: int, width: int) -> str:
    sequence, pos = divmod(place, width)
    return f"sequence {window.first_seq + numbers[sequence]}, position {pos}"


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
