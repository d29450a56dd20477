"""The model that a run's rows are of, run once more on a text that somebody types: its tokens with their sparse codes.

A text goes through it as those of the harvest did: cut to the same length, with the same special tokens before and
after, in the dtype that the model ran in. Tokens that the harvest left out have no code here either.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saefast.analysis.evaluation import load_finished
from saefast.data.provenance import recorded_data
from saefast.data.shards import ShardFolder
from saefast.data.source import X, side_by_side
from saefast.errors import InputError
from saefast.forward import vocabulary_size
from saefast.harvest.capture import runner_for
from saefast.harvest.documents import Fingerprint, whole_characters
from saefast.harvest.harvested_model import harvested_model, harvested_tokenizer
from saefast.harvest.kept import TokenChoice, finite_rows, multiple_of, ordinary_norms
from saefast.harvest.sequences import Sequencer
from saefast.harvest.token_text import Texts
from saefast.models.sae import SAE
from saefast.training.residual import Stack, stack_of

# Characters of a text, and tokens of it that go through the model.
LONGEST, MOST_TOKENS = 100_000, 2048


class ReadText(NamedTuple):
    """A text as the model read it, n tokens in all.

    tokens (n,) int32: ids, special tokens included; texts: of each, joined the text again; kept (n,) bool: which have a
    code; starts: where sequences begin. row_ptr (n + 1,) int64, idx (entries,) int32 and acts (entries,) float32: the
    code, entries above 0 alone, the strongest of a token first. left_out: tokens at the text's end that were not read.
    """

    tokens: np.ndarray
    texts: list[str]
    kept: np.ndarray
    starts: list[int]
    row_ptr: np.ndarray
    idx: np.ndarray
    acts: np.ndarray
    left_out: int


class TextReader:
    """The model, tokenizer and SAE of a run, loaded and ready; `model` and `tokenizer` as for `harvested_model`.

    May be used by several threads, whose texts wait for one another.

    data: the harvest, where the run's config does not say which one or it was moved.

    Raises:
        InputError: the run's rows are of no harvest of text, or of several models; a model that does not load or is
            another one than was harvested.
    """

    def __init__(self, run: Path, data: str | Path | None = None, model: Any = None, tokenizer: Any = None) -> None:
        self.sae = load_finished(run)
        folder, self.hooks = _harvest(run, self.sae, data)
        index = folder.index
        self._stack: Stack = stack_of(run, self.sae)
        self.model = harvested_model(index, model, device=self.sae.device)
        self.tokenizer = harvested_tokenizer(index, tokenizer, model)
        self._runner = runner_for(self.model, self.hooks)
        self._texts = Texts(self.tokenizer)
        self._choice = TokenChoice.from_index(index, self.tokenizer.all_special_ids)
        self._limits = _limits(index, self.hooks)
        # A model's hooks are for one text at a time.
        self._one = threading.Lock()
        self._sequencer = Sequencer(
            self.tokenizer,
            min(int(index.get("ctx_len") or MOST_TOKENS), MOST_TOKENS),
            prepend_bos=_prepend_bos(index, self.model),
            share=0,
            vocabulary=vocabulary_size(self.model),
        )

    @property
    def digest(self) -> str:
        """Of the SAE's weights, and of those before it, as latents.db has it."""
        return self._stack.digest()

    def read(self, text: str) -> ReadText:
        """A text's tokens and their codes: of the first MOST_TOKENS of them.

        Raises:
            InputError: the text is empty, or longer than LONGEST.
        """
        if len(text) > LONGEST:
            raise InputError(f"the text has {len(text):,} characters: expected at most {LONGEST:,}; give a part of it")
        text = whole_characters(text)
        cut = self._sequencer.windows(iter([text]), Fingerprint()) if text.strip() else iter(())
        sequences = [ids for window in cut for ids in window.ids]
        if not sequences:
            raise InputError("the text is empty: type or paste some")
        n_tokens = sum(map(len, sequences))
        sequences = sequences[: max(MOST_TOKENS // len(sequences[0]), 1)]
        with self._one, self._runner.attached():
            codes = [self._code(ids) for ids in sequences]
        counts = np.concatenate([code.counts for code in codes])
        tokens = [token for ids in sequences for token in ids]
        return ReadText(
            tokens=np.array(tokens, np.int32),
            # Of all sequences at once: a word or a character may end in the next one.
            texts=self._texts.run(tokens),
            kept=np.concatenate([code.kept for code in codes]),
            starts=np.cumsum([0, *map(len, sequences[:-1])]).tolist(),
            row_ptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            idx=np.concatenate([code.idx for code in codes]),
            acts=np.concatenate([code.acts for code in codes]),
            left_out=n_tokens - len(tokens),
        )

    def name(self, token: int) -> str:
        """What the tokenizer calls a token; special ones have no other text."""
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def _code(self, ids: list[int]) -> "_Code":
        """Of one sequence."""
        tokens, mask = np.array([ids], np.int64), np.ones((1, len(ids)), bool)
        hidden = self._runner.run(torch.from_numpy(tokens), torch.from_numpy(mask))
        _, chosen = self._choice(tokens, mask)
        rows = {hook: values[0, torch.from_numpy(chosen[0]).to(values.device)] for hook, values in hidden.items()}
        good, _ = finite_rows(rows, None)
        if self._limits:
            good &= ordinary_norms({hook: rows[hook] for hook in self._limits}, self._limits)
        kept = chosen[0].copy()
        kept[kept] = good.numpy()
        x = torch.cat([rows[hook][good.to(rows[hook].device)] for hook in self.hooks], 1)
        return _Code.of(kept, *self._encoded(x.float().to(self.sae.device)))

    @torch.no_grad()
    def _encoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not len(x):
            none = torch.zeros(0, 1, dtype=torch.float32, device="cpu")
            return none, none.int()
        acts, idx = self.sae.encode_sparse(self._stack.last_given(x))
        return acts.float().cpu(), idx.cpu()


class _Code(NamedTuple):
    """Of a sequence: kept (n,) bool; counts (n,) int64 of entries; idx, acts (entries,)."""

    kept: np.ndarray
    counts: np.ndarray
    idx: np.ndarray
    acts: np.ndarray

    @classmethod
    def of(cls, kept: np.ndarray, acts: Tensor, idx: Tensor) -> "_Code":
        """acts, idx (rows, k): the rows are those that are kept."""
        acts, order = acts.sort(dim=1, descending=True, stable=True)
        fires = acts > 0
        counts = np.zeros(len(kept), np.int64)
        counts[kept] = fires.sum(1).numpy()
        return cls(kept, counts, idx.gather(1, order)[fires].int().numpy(), acts[fires].numpy())


def _harvest(run: Path, sae: SAE, data: str | Path | None) -> tuple[ShardFolder, tuple[str, ...]]:
    """The harvest that a run's rows are from, and those of its hooks that lie side by side in x."""
    kept = recorded_data(sae.config.metadata, run)
    if kept is not None and kept.get("beside"):
        raise InputError("rows of this run come from several models side by side, and a text goes through one")
    place = run / kept["path"] if data is None and kept is not None else data
    if place is None or not (Path(place) / "index.json").is_file():
        where = "somewhere that its config does not say" if place is None else str(place)
        raise InputError(f"rows of this run come from {where}, which is no harvest: which model they are of is unknown")
    folder = ShardFolder(place)
    folder.require_text()
    names: tuple[str | None, ...] = (_named_hook(sae.config.metadata, folder),)
    if kept is not None:
        names = side_by_side(kept["hooks"])[X] if kept.get("hooks") else (kept.get("hook"),)
    return folder, tuple(folder.hook(name) for name in names)


def _named_hook(metadata: Mapping[str, Any], folder: ShardFolder) -> str | None:
    """The hook that another library's SAE says it is of, where the harvest has it by that name."""
    there = [hook[key] for hook in folder.index["hooks"] for key in ("name", "hf_name")]
    return next((name for key in ("hook_name", "hf_hook_name") if (name := metadata.get(key)) in there), None)


def _limits(index: Mapping[str, Any], hooks: tuple[str, ...]) -> dict[str, float]:
    """By hook the largest norm of a row that the harvest kept; empty where it kept all."""
    multiple, medians = index.get("max_norm_multiple"), index.get("median_norms") or {}
    return {hook: multiple_of(multiple) * medians[hook] for hook in hooks if multiple and hook in medians}


def _prepend_bos(index: Mapping[str, Any], model: Any) -> bool | None:
    """As the harvest did: what it was told, else what a model of TransformerLens does by itself."""
    told: bool | None = index.get("settings", {}).get("prepend_bos")
    return getattr(getattr(model, "cfg", None), "default_prepend_bos", None) if told is None else told
