"""Whose rows: digests of a model's weights and of its tokenizer, kept with every harvest, because names are reused."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saefast.data.shards import Identity
from saefast.errors import InputError

# A name up to its first number: "encoder.layer.3.output.dense.weight" is of the part "encoder.layer.3".
_BLOCK = re.compile(r"(.*?\.\d+)(\.|$)")
# Words of a tensor whose places count; of the others the sum alone does.
_SAMPLE = 4096
# Text in which tokenizers differ: spaces, digits, capitals, accents, scripts, code, special tokens of several.
_PROBE = (
    "The quick brown fox, 1234567.89% of 'don't' \u2014 na\u00efve caf\u00e9s!  \n\n\tdef getHTTP(self): x_1 += 0x7F\n"
    "\u00bfQu\u00e9? \u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u4e2d\u6587 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 "
    "\u0639\u0631\u0628\u064a \U0001f600 e\u0301 \ufb01 ##ing <|endoftext|> [SEP] </s> ANTIDISESTABLISHMENTARIANISM"
)


def identity_of(model: Any, tokenizer: Any) -> Identity:
    """What index.json keeps of a model and its tokenizer; None for either: not known."""
    return {
        "dtype": dtype_of(model),
        "weights": weights_digest(model),
        "tokenizer": None if tokenizer is None else tokenizer_digest(tokenizer),
    }


def dtype_of(model: Any) -> str | None:
    """What dtype a model's first parameter has ("float32"); None where it has none."""
    parameter = next(iter(model.parameters()), None) if hasattr(model, "parameters") else None
    return None if parameter is None else str(parameter.dtype).removeprefix("torch.")


def weights_digest(model: Any) -> dict[str, str] | None:
    """A digest of each part of a model's state dict: of every block, and of what lies beside them (lm_head).

    Every byte counts: of each tensor its name, shape and dtype, the sum of all its 8-byte words modulo 2**64, and
    _SAMPLE of them spread evenly, in order. So any change of one number shows; tensors are read where they lie, at the
    speed of their memory, and the device changes nothing. The dtype does: a model loaded in another gives other rows.
    Names are those in the base model, so that one with a head and one without are alike in the parts that both have.
    Poolers are left out: where a checkpoint has none, each load makes up another.
    Of a tensor on "meta", and of a model that is none of torch's (None), nothing is known.
    """
    if not isinstance(model, nn.Module):
        return None
    base = str(getattr(model, "base_model_prefix", "") or "")
    base = base + "." if base and hasattr(model, base) else ""
    hashes: dict[str, Any] = {}
    for name, tensor in _tensors(model.state_dict()):
        plain = name.replace("_orig_mod.", "").removeprefix(base)
        if "pooler" in plain.split("."):
            continue
        block = _BLOCK.match(plain)
        part = block[1] if block else plain.split(".")[0]
        seen = hashes.setdefault(part, hashlib.blake2b(digest_size=8))
        seen.update(f"{plain} {tuple(tensor.shape)} {tensor.dtype}".encode())
        seen.update(_content(tensor))
    return {part: seen.hexdigest() for part, seen in hashes.items()}


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of what a tokenizer makes of text: its vocabulary, merges or scores, special tokens, what it puts
    around a text, and the ids of a text in which tokenizers differ. Raises InputError for what is no tokenizer."""
    if not callable(tokenizer) or not hasattr(tokenizer, "all_special_ids"):
        raise InputError(f"tokenizer is a {type(tokenizer).__name__}: expected the one that belongs to the model")
    facts: list[Any] = [sorted(getattr(tokenizer, "get_vocab", dict)().items()), sorted(tokenizer.all_special_ids)]
    facts.append(_merges(tokenizer))
    facts += [list(tokenizer(_PROBE, add_special_tokens=add, verbose=False)["input_ids"]) for add in (False, True)]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def why_other(kept: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How `now` is another model or tokenizer than `kept`, in words; "" where nothing that both know says so.

    A head that only one of them has makes no difference: no row of a block depends on it.
    """
    before, after = kept.get("weights"), now.get("weights")
    if before is not None and after is not None and (why := _why_others(before, after)):
        if kept.get("dtype") != now.get("dtype"):
            return f"its weights are {now.get('dtype')}, those harvested from were {kept.get('dtype')}"
        return why
    tokenizers = kept.get("tokenizer"), now.get("tokenizer")
    if None not in tokenizers and tokenizers[0] != tokenizers[1]:
        return "its tokenizer is another (in vocabulary, special tokens, or how it splits text)"
    return ""


def _why_others(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    blocks = [[part for part in parts if part[-1].isdigit()] for parts in (before, after)]
    if all(blocks) and not set(blocks[0]) & set(blocks[1]):
        return f"its weights have other names ({blocks[1][0]}, not {blocks[0][0]})"
    parts = [part for part in {**before, **after} if part[-1].isdigit() or (part in before and part in after)]
    other = [part for part in parts if before.get(part) != after.get(part)]
    return f"its weights are others ({len(other)} of {len(parts)} parts, {other[0]} first)" if other else ""


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict, also those in tuples, as quantised layers have them."""
    for name, value in state.items():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Tensor):
                yield name, item.detach()


def _content(tensor: Tensor) -> bytes:
    """Bytes that depend on every element, without a copy of the tensor."""
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    if tensor.is_meta or tensor.layout != torch.strided:
        return b""
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    whole = len(raw) // 8 * 8
    words, rest = raw[:whole].view(torch.int64), raw[whole:]
    # Whole numbers: no order of adding them changes the sum.
    picked = torch.cat([words.sum()[None], words[:: max(len(words) // _SAMPLE, 1)]])
    return picked.cpu().numpy().tobytes() + rest.cpu().numpy().tobytes()


def _merges(tokenizer: Any) -> Any:
    """How the backend of a fast tokenizer joins or weighs pieces; None where there is no such thing."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return None
    model = json.loads(backend.to_str()).get("model") or {}
    # Written as "a b" or as ["a", "b"].
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
    scores = model.get("vocab") if isinstance(model.get("vocab"), list) else None
    return [merges, scores]
