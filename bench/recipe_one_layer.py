"""A one-layer transformer on Python's sources, and the rows of its 512 ReLU neurons.

As in "Towards Monosemanticity" (Bricken et al. 2023), but small: d_model 128, 512 neurons, 4 heads, contexts of 128
tokens of a byte-level BPE of 2048, trained for 1000 steps of 32 contexts: three minutes of one core.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, CONTEXT, WIDTH, NEURONS, HEADS = 2048, 128, 128, 512, 4
STEPS, BATCH, RATE = 1000, 32, 3e-3
# Every 20th file is held out.
HELDOUT_EVERY = 20


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, NEURONS), nn.Linear(NEURONS, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def neurons(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The stream before the MLP (B, T, WIDTH), and the neurons after their ReLU (B, T, NEURONS)."""
        B, T = ids.shape
        stream = self.embed(ids) + self.places.weight[:T]
        q, k, v = (
            part.view(B, T, HEADS, -1).transpose(1, 2) for part in self.qkv(self.norm_1(stream)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        stream = stream + self.out(mixed.transpose(1, 2).reshape(B, T, WIDTH))
        return stream, F.relu(self.up(self.norm_2(stream)))

    def forward(self, ids: Tensor) -> Tensor:
        stream, neurons = self.neurons(ids)
        return self.head(self.norm_3(stream + self.down(neurons)))


def tokens(folder: Path) -> dict[str, np.ndarray]:
    """{"train", "heldout"}: contexts (n, CONTEXT) int16 of Python's sources, kept in the folder."""
    path = folder / "one-layer-tokens.npz"
    if not path.exists():
        np.savez(path, **_tokenized())
    with np.load(path) as found:
        return {split: found[split] for split in ("train", "heldout")}


def _tokenized() -> dict[str, np.ndarray]:
    from tokenizers import ByteLevelBPETokenizer

    root = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in sorted(root.rglob("*.py")) if not {"site-packages", "dist-packages"} & set(p.parts)]
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in paths]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, show_progress=False)
    ids: dict[str, list[int]] = {"train": [], "heldout": []}
    for number, encoded in enumerate(bpe.encode_batch(texts)):
        ids["heldout" if number % HELDOUT_EVERY == 0 else "train"] += encoded.ids
    return {
        split: np.array(all_of[: len(all_of) // CONTEXT * CONTEXT], np.int16).reshape(-1, CONTEXT)
        for split, all_of in ids.items()
    }


def trained(folder: Path) -> OneLayer:
    """The transformer, kept in the folder once it is trained."""
    path = folder / "one-layer.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OneLayer()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.requires_grad_(False)
    contexts = torch.from_numpy(tokens(folder)["train"])
    order = torch.Generator("cpu").manual_seed(0)
    adam = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
    for step in range(STEPS):
        ids = contexts[torch.randint(len(contexts), (BATCH,), generator=order)].long()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"one-layer transformer: step {step}, loss {loss:.3f}", flush=True)
    torch.save(model.state_dict(), path)
    return model.requires_grad_(False)


def one_layer_rows(folder: Path, split: str, n: int) -> tuple[Iterator[Tensor], int]:
    """Batches of rows of the neurons, at least n in all, and how wide they are. A batch is shuffled."""
    model, contexts = trained(folder), torch.from_numpy(tokens(folder)[split])
    order = torch.Generator("cpu").manual_seed(1)
    chosen = contexts[torch.randperm(len(contexts), generator=order)]

    def batches() -> Iterator[Tensor]:
        for ids in chosen.split(512):
            rows = model.neurons(ids.long())[1].flatten(0, 1)
            yield rows[torch.randperm(len(rows), generator=order)]

    return batches(), NEURONS
