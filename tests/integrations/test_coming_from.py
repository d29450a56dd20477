"""docs/coming-from.md: every line of it is run, and what their lines and ours call by one name is the same."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import recipes_plain as plain
import torch
from torch import Tensor, nn

import saefast
from saefast.cli.main import main
from saefast.data.shard_writer import ShardWriter

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming-from.md"
PEERS = {"SAELens": "sae_lens", "sparsify": "sparsify", "dictionary_learning": "dictionary_learning"}
D, L, K, B, STEPS = 32, 256, 6, 128, 8
# Of 8 steps in fp32 on rows that were not looked through for near ties.
TOLERANCE = 1e-3


class Part(NamedTuple):
    """Lines of a block below a comment that says whose they are."""

    who: str
    code: str

    @property
    def is_ours(self) -> bool:
        return self.who.startswith("saefast")

    @property
    def assigned(self) -> set[str]:
        return {
            name.id
            for node in ast.walk(ast.parse(self.code))
            if isinstance(node, ast.Assign)
            for target in node.targets
            for name in ast.walk(target)
            if isinstance(name, ast.Name)
        }


def sections() -> dict[str, list[list[Part]]]:
    """By peer, the blocks of its section."""
    found = {}
    for text in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]:
        blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
        heads = rf"^# ((?:saefast with )?(?:{'|'.join(PEERS)})|saefast)\n"
        found[text.partition("\n")[0]] = [
            [Part(who, code) for who, code in zip(split[1::2], split[2::2], strict=True)]
            for split in (re.split(heads, block, flags=re.M) for block in blocks)
        ]
    return found


SECTIONS = sections()
COMMANDS = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def rows(n: int = STEPS) -> list[Tensor]:
    return [x.float() for x in plain.batches(0, 0.1, n=n)]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page takes for granted: x, batches, and folders of each library beside a folder of shards."""
    monkeypatch.chdir(tmp_path)
    for peer in PEERS.values():
        name = "saelens" if peer == "sae_lens" else peer
        config, _ = saefast.preset(name, D, L, K)
        sae = saefast.SAE(config, seed=1)
        saefast.save(sae, name, format=name)
    with ShardWriter("shards", [{"name": "h", "hf_name": "h"}], "float32") as writer:
        x = torch.cat(rows())
        writer.add("train", {"h": x}, torch.zeros(len(x)), torch.arange(len(x)))
        writer.commit({}, complete=True)
    return {"x": rows(1)[0], "batches": rows()}


class Rows(nn.Module):
    """A "language model" whose module `site` puts out the row of a table that each token names."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.site, self.device = table, nn.Identity(), table.device
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.site(self.table[input_ids])


def of_sae_lens() -> dict[str, Any]:
    import sae_lens
    from sae_lens.config import SAETrainerConfig

    def training_sae() -> Any:
        torch.manual_seed(0)
        return sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=D, d_sae=L, k=K))

    config = SAETrainerConfig(total_training_samples=STEPS * B, train_batch_size_samples=B, lr_end=3e-5)
    return {"cfg": config, "training_sae": training_sae}


def of_sparsify() -> dict[str, Any]:
    import sparsify

    config = sparsify.TrainConfig(
        sparsify.SparseCoderConfig(num_latents=L, k=K), batch_size=1, lr_warmup_steps=2, log_to_wandb=False,
        optimizer="adam", hookpoints=["site"],
    )  # fmt: skip
    dataset = [{"input_ids": torch.arange(i * B, (i + 1) * B)} for i in range(STEPS)]
    return {"cfg": config, "dataset": dataset, "model": Rows(torch.cat(rows()))}


def of_dictionary_learning() -> dict[str, Any]:
    settings = dict(
        activation_dim=D, dict_size=L, k=K, steps=STEPS, layer=0, lm_name="none", warmup_steps=2, seed=0, device="cpu"
    )
    return {"settings": settings}


TAKEN_FOR_GRANTED = {"SAELens": of_sae_lens, "sparsify": of_sparsify, "dictionary_learning": of_dictionary_learning}


def test_the_page_is_read_whole() -> None:
    """No block without a line that is ours, no line without an owner, all the ways that the page is about."""
    assert set(SECTIONS) == set(PEERS)
    for peer, blocks in SECTIONS.items():
        assert len(blocks) >= 4
        for block in blocks:
            assert any(part.is_ours for part in block), block
            assert {part.who for part in block} <= {"saefast", f"saefast with {peer}", peer}
        ours = "\n".join(part.code for block in blocks for part in block if part.is_ours)
        for way in ("saefast.load(", "saefast.save(", "saefast.train(", "saefast.accelerate(", "saefast.integrations."):
            assert way in ours, way
    fences = PAGE.read_text(encoding="utf-8").count("```")
    assert fences == 2 * (len(COMMANDS) + sum(map(len, SECTIONS.values())))
    assert len(COMMANDS) == 1


@pytest.mark.usefixtures("names")
def test_commands() -> None:
    for line in COMMANDS[0].splitlines():
        program, *arguments = shlex.split(line)
        assert program == "saefast"
        assert main(arguments) == 0
    x = rows(1)[0]
    for before, after in (("saelens", "as-sparsify"), ("dictionary_learning", "as-saelens")):
        assert plain.distance(saefast.load(after)(x).x_hat, saefast.load(before)(x).x_hat) < 1e-5


@pytest.mark.parametrize("peer", PEERS)
def test_our_lines(peer: str, names: dict[str, Any]) -> None:
    """Those that need nothing but saefast."""
    for block in SECTIONS[peer]:
        for part in block:
            if part.who == "saefast":
                exec(part.code, names)
    assert torch.equal(names["x"], rows(1)[0])


@pytest.mark.peers
@pytest.mark.parametrize("peer", PEERS)
def test_their_lines_and_ours(peer: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(PEERS[peer]) is None:
        pytest.skip(f"{PEERS[peer]} is not installed")
    # sparsify lowers the precision of matmuls for the whole process.
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    names |= TAKEN_FOR_GRANTED[peer]()
    ours, theirs = dict(names), dict(names)
    compared = set()
    for block in SECTIONS[peer]:
        for part in block:
            exec(part.code, ours if part.is_ours else theirs)
        both = [part.assigned for part in block]
        for name in set.intersection(*both) if len(both) > 1 else ():
            if same(name, ours[name], theirs[name]):
                compared.add(name)
    assert {"W_dec", "x_hat"} <= compared or {"W_dec", "f"} <= compared


def same(name: str, mine: Any, own: Any) -> bool:
    """Asserts that two tensors, or texts, of one name are equal; False for other things."""
    if isinstance(mine, Tensor) and isinstance(own, Tensor):
        if name == "idx":
            assert torch.equal(mine.long().sort().values, own.long().sort().values)
        else:
            mine, own = (t.detach().sort().values if name == "acts" else t.detach() for t in (mine, own))
            assert plain.distance(mine, own) < TOLERANCE, name
        return True
    if isinstance(mine, str):
        assert mine == own, name
        return True
    return False
