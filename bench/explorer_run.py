"""A made-up run for bench/explorer.py, as large as asked for: an SAE, and a harvest of text that its latents fire on.

A row is a sum of decoder rows: latents that belong to its token, to the two tokens before it and to the topics of its
sequence, and some at random, of very unequal frequency. Tokens are words of a made-up vocabulary, by Zipf's law. Every
number comes from a seed, so a run of the same sizes is the same everywhere.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saefast import SAE, SAEConfig
from saefast.data.shard_writer import ShardWriter
from saefast.harvest.identity import identity_of

HOOK = {"name": "layers.0", "hf_name": "layers.0"}
MODEL, HARVEST = "model", "activations"
HELDOUT = 0.05
# Latents of a row: of its own token, of each of the two before it, of its sequence's topics, and any others.
OWN, BEFORE, TOPICAL, OTHERS = 3, 3, 8, 10
TOPICS, A_TOPIC = 1000, 32
# Sequences that are made together.
AT_A_TIME = 32
SIGNS = (".", ",", "the", "of")
SYLLABLES = [a + b for a in "b d f g k l m n p r s t v z sh th".split() for b in "a e i o u ai ou en".split()]  # noqa: SIM905


class Size(NamedTuple):
    """n_rows: tokens of text, which are all rows. length: of a sequence."""

    n_latents: int
    n_rows: int
    d_in: int
    k: int
    vocabulary: int
    length: int = 128


def vocabulary(n: int) -> list[str]:
    """n different words, short ones first; the first few are signs and the words that hold sentences together."""
    words, base = list(SIGNS), len(SYLLABLES)
    number = base
    while len(words) < n:
        parts, rest = [], number
        while rest:
            rest, part = divmod(rest, base)
            parts.append(SYLLABLES[part])
        words.append("".join(parts))
        number += 1
    return words[:n]


def tokenizer(words: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # A token is a word with the space before it, as in byte-level vocabularies.
    names = {"<unk>": 0} | {word if word in ".," else f"\u2581{word}": i for i, word in enumerate(words, start=1)}
    core = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", model_max_length=1 << 16)


def language_model(size: Size) -> Any:
    """Embeddings that logit weights are taken from; no row is of it."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary + 1, hidden_size=size.d_in, num_hidden_layers=1, intermediate_size=size.d_in,
        num_attention_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def dictionary(size: Size) -> SAE:
    """Unit rows at random, encoder and decoder alike. One latent in fifty is dead."""
    sae = SAE(SAEConfig(d_in=size.d_in, n_latents=size.n_latents, k=size.k, activation="topk"))
    rows = torch.randn(size.n_latents, size.d_in, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.W_enc.copy_(F.normalize(rows, dim=1))
        sae.W_dec.copy_(sae.W_enc)
        sae.b_enc.zero_()
        sae.b_enc[::50] = -1e4
        sae.b_dec.zero_()
    kept = {"path": HARVEST, "hook": None, "key": None, "heldout": HELDOUT, "shuffle": "mapped"}
    sae.config.metadata.update(data=kept, model_name=MODEL, hook_name=HOOK["name"], hf_hook_name=HOOK["hf_name"])
    return sae.requires_grad_(False)


def texts(size: Size, rng: np.random.Generator) -> np.ndarray:
    """Token ids (sequences, length): 1 and up, the most frequent first."""
    share = 1 / (np.arange(size.vocabulary) + 2.7)
    drawn = rng.choice(size.vocabulary, (size.n_rows // size.length, size.length), p=share / share.sum())
    return drawn.astype(np.int32) + 1


def rows(size: Size, W_dec: Tensor, tokens: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Rows (sequences · length, d_in) of some sequences."""
    ids = np.concatenate(list(_latents(size, tokens, rng)), axis=2).reshape(tokens.size, -1)
    acts = 2 * np.exp(rng.normal(0, 0.3, ids.shape))
    acts[:, :OWN] *= 1.5
    clean = F.embedding_bag(torch.from_numpy(ids), W_dec, per_sample_weights=torch.from_numpy(acts).float(), mode="sum")
    return clean + 0.02 * torch.from_numpy(rng.standard_normal(clean.shape, np.float32))


def _latents(size: Size, tokens: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Which latents make up each token's row, (sequences, length, some) at a time."""
    n = size.n_latents
    # Numbers that follow on each other land far apart: latents of a token are no neighbours.
    for back, many in ((0, OWN), (1, BEFORE), (2, BEFORE)):
        token = np.roll(tokens, back, axis=1).astype(np.int64)
        yield (token[..., None] * 2_654_435_761 + np.arange(many) * 40_503 + back * 97) % n
    topic = rng.integers(0, TOPICS, (len(tokens), 1, 2))[..., rng.integers(0, 2, TOPICAL)]
    member = rng.integers(0, A_TOPIC, (*tokens.shape, TOPICAL))
    yield (topic * 7_368_787 + member * 15_485_863) % n
    yield (n * rng.random((*tokens.shape, OTHERS)) ** 3).astype(np.int64)


def write_harvest(folder: Path, size: Size, W_dec: Tensor, index: dict[str, Any]) -> None:
    rng = np.random.default_rng(2)
    tokens = texts(size, rng)
    with ShardWriter(folder, [HOOK], settings={"model": index["model"], "ctx_len": size.length}) as writer:
        for first in range(0, len(tokens), AT_A_TIME):
            part = tokens[first : first + AT_A_TIME]
            numbers = torch.arange(first, first + len(part))
            writer.add_sequences(first, numbers.tolist(), part.tolist())
            writer.add(
                "heldout" if first < HELDOUT * len(tokens) else "train",
                {HOOK["name"]: rows(size, W_dec, part, rng)},
                numbers.repeat_interleave(size.length),
                torch.arange(size.length).repeat(len(part)),
            )
        writer.commit({"docs": len(tokens)}, complete=True, **index)


def make(folder: Path, size: Size) -> Path:
    """A run in a folder, made unless it is there already with these sizes."""
    said = folder / "size.json"
    if said.exists() and json.loads(said.read_text(encoding="utf-8")) == size._asdict():
        return folder
    if said.exists():
        raise SystemExit(f"{folder} is a run of other sizes: {said.read_text(encoding='utf-8')}; choose another folder")
    sae, model, words = dictionary(size), language_model(size), tokenizer(vocabulary(size.vocabulary))
    model.save_pretrained(folder / MODEL)
    words.save_pretrained(folder / MODEL)
    identity = identity_of(model, words)
    index = {"model": str((folder / MODEL).resolve()), "revision": None, "forward": "float32", "identity": identity}
    sae.save(folder)
    write_harvest(folder / HARVEST, size, sae.W_dec.detach(), index)
    said.write_text(json.dumps(size._asdict()), encoding="utf-8")
    return folder
