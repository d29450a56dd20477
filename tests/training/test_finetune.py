"""Fine-tuning through a language model: its arithmetic against plain torch, what it gains, and what it leaves alone."""

import copy
import dataclasses
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

import saefast
from saefast.data.shards import ShardFolder
from saefast.errors import InputError
from saefast.harvest.harvester import Harvester
from saefast.harvest.reading import cut
from saefast.harvest.to_disk import HarvestConfig, harvest
from saefast.metrics.language_model import batch_sequences, lm_scores
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, load
from saefast.places import Place
from saefast.training.api import train
from saefast.training.finetune import FINETUNED, finetune
from saefast.training.finetune_config import FinetuneConfig, chosen
from saefast.training.loop import Stopped
from saefast.training.progress import read_metrics
from saefast.training.spliced_model import SplicedModel

HOOK = "middle"
HARVEST = HarvestConfig(
    hooks=(HOOK,), ctx_len=24, dtype="float32", forward="float32", heldout=0.2, device="cpu", prepend_bos=True
)
TEXTS = tiny_models.documents(120)
QUICK = dict(n_tokens=40 * 256, batch_tokens=256, lr=1e-2, save_every=0, log_every=1)


class Model(nn.Module):
    """Predicts from a row of 16 numbers, the sum of what three tokens have; the 6 small ones of them count alone."""

    def __init__(self) -> None:
        super().__init__()
        draws, large = torch.Generator().manual_seed(0), torch.arange(16) >= 6
        self.embed = nn.ModuleList(nn.Embedding(66, 16) for _ in range(3))
        self.before, self.middle, self.head = nn.Dropout(0.5), nn.Identity(), nn.Linear(16, 66, bias=False)
        with torch.no_grad():
            for embed in self.embed:
                embed.weight.copy_(torch.randn(66, 16, generator=draws) * torch.where(large, 3.0, 1.0))
            self.head.weight.copy_(torch.randn(66, 16, generator=draws) * ~large)
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        T = input_ids.shape[1]
        x = sum(embed(nn.functional.pad(input_ids, (i, 0))[:, :T]) for i, embed in enumerate(self.embed))
        return SimpleNamespace(logits=self.head(self.middle(self.before(x))))


class World:
    """The model, and an SAE for its rows of each kind."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer, self.acts = Model(), tiny_models.tokenizer(special=False), folder / "acts"
        harvest(self.acts, HARVEST, text=TEXTS, progress=False, model=self.model, tokenizer=self.tokenizer)
        self.saes: dict[str, SAE] = {}

    def sae(self, **fields: Any) -> SAE:
        if str(fields) not in self.saes:
            config = saefast.TrainConfig(n_tokens=30_000, batch_size=256, device="cpu", eval_every=0, save_every=0)
            known = {"d_in": 16, "n_latents": 64, "k": 4, "metadata": {"hook_name": HOOK}}
            self.saes[str(fields)] = train(self.acts, SAEConfig(**known | fields), config, progress=False)
        return self.saes[str(fields)]

    def scores(self, sae: SAE) -> dict[str, float]:
        """On the held-out text."""
        folder = ShardFolder(self.acts)
        held = sorted({int(s) for info in folder.shards("heldout") for s in folder.open(info).seq})
        batches = batch_sequences([folder.tokens(s) for s in held], 8)
        with torch.no_grad():
            found = lm_scores(self.model, [Place(HOOK)], lambda x: sae(x).x_hat, batches, [2])
            x = torch.cat([folder.open(info).acts for info in folder.shards("heldout")]).float()
            out = sae(x)
        fvu = (x - out.x_hat).square().sum() / (x - x.mean(0)).square().sum()
        return found | {"fvu": float(fvu), "l0": float((out.acts > 0).sum(1).float().mean())}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def topk(world):
    return world.sae()


def same(one: SAE, other: SAE) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the arithmetic


def dense(sae: SAE, model: nn.Module, batches, config, scale: float, prefixes: tuple[int, ...]) -> dict:
    """The same updates in plain torch: a dense code, a hook that puts x̂ in place, Adam and unit rows by hand."""
    p = {name: value.detach().clone() for name, value in sae.named_parameters()}
    p["b_enc"], p["b_dec"] = p["b_enc"] * scale, p["b_dec"] * scale
    state = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in p.items()}
    model = copy.deepcopy(model)
    steps, warm = config.steps, round(0.05 * config.steps)
    taken: dict[str, Tensor] = {}
    for t, batch in enumerate(batches):
        for value in p.values():
            value.requires_grad_()
        with torch.no_grad():
            handle = model.middle.register_forward_hook(lambda _m, _a, o: taken.update(x=o))
            clean = model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits.log_softmax(-1)
            handle.remove()
        x = taken["x"][batch.kept] * scale
        pre = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
        best = pre.topk(sae.config.k).indices
        f = torch.zeros_like(pre).scatter(1, best, pre.gather(1, best).relu())
        hats = [f[:, :n] @ p["W_dec"][:n] + p["b_dec"] for n in prefixes]
        R = sum(((x - hat) ** 2).sum() for hat in hats) / ((x - x.mean(0)) ** 2).sum()
        put = taken["x"].clone()
        put[batch.kept] = hats[-1] / scale
        handle = model.middle.register_forward_hook(lambda _m, _a, _o, put=put: put)
        now = model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits.log_softmax(-1)
        handle.remove()
        kl = (clean.exp() * (clean - now)).sum(-1)[batch.kept].mean()
        s = config.kl_share
        grads = torch.autograd.grad((1 - s) * R + s * (R / kl).detach() * kl, list(p.values()))
        lr = config.lr * ((t + 1) / warm if t < warm else (steps - t) / (steps - warm))
        with torch.no_grad():
            for (name, value), grad in zip(p.items(), grads, strict=True):
                if name == "W_dec":
                    grad = grad - (grad * value).sum(1, keepdim=True) / (value**2).sum(1, keepdim=True) * value
                m, v = state[name]
                m.lerp_(grad, 0.1)
                v.lerp_(grad**2, 0.001)
                hat = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.999 ** (t + 1))
                p[name] = value - lr * hat[0] / (hat[1].sqrt() + 1e-8)
            p["W_dec"] = p["W_dec"] / p["W_dec"].norm(dim=1, keepdim=True)
    return p | {"b_enc": p["b_enc"] / scale, "b_dec": p["b_dec"] / scale}


@pytest.mark.parametrize("fields", [{}, {"matryoshka": (16, 64)}], ids=["topk", "matryoshka"])
def test_a_dense_statement_takes_the_same_steps(world, fields):
    sae = SAE(SAEConfig(d_in=16, n_latents=64, k=4, dtype="float64", metadata={"hook_name": HOOK}, **fields), seed=1)
    model = copy.deepcopy(world.model).double()
    config = FinetuneConfig(n_tokens=6 * 200, batch_tokens=200, lr=1e-2, kl_share=0.7, max_norm_multiple=None)
    reading = cut(Harvester(HARVEST, text=TEXTS, model=model, tokenizer=world.tokenizer), config.n_tokens)
    settled, batches = chosen(config, sae.config, 0), reading.batches(200, 0)
    batches = [next(batches) for _ in range(6)]
    hidden: list[Tensor] = []
    handle = model.middle.register_forward_hook(lambda _m, _a, o: hidden.append(o.detach()))
    for batch in batches:
        model(input_ids=batch.ids)
    handle.remove()
    rows = torch.cat([x[batch.kept] for x, batch in zip(hidden, batches, strict=True)])
    lines = []
    tuned = finetune(
        sae, model, TEXTS, config, tokenizer=world.tokenizer, harvest=HARVEST, on_log=lines.append, progress=False
    )
    # A power of two, from a few rows: which one is of no importance, for activations and biases are scaled alike.
    norm = math.sqrt(16) / (rows - rows.median(0).values).norm(dim=1).median()
    scale = 2.0 ** round(math.log2(norm))
    expected = dense(sae, model, batches, settled, scale, fields.get("matryoshka", (64,)))
    for name, value in tuned.named_parameters():
        assert (value - expected[name]).abs().max() < 1e-9, name
        assert (value - getattr(sae, name)).abs().max() > 1e-3, name
    assert len(lines) == 1
    assert tuned.config.metadata[FINETUNED]["kl_share"] == 0.7


# --- what comes of it


KINDS = [
    {},
    {"activation": "batchtopk"},
    {"matryoshka": (16, 64)},
    {"activation": "jumprelu"},
    {"input_norm": "layer_norm"},
]


@pytest.mark.parametrize("fields", KINDS, ids=["topk", "batchtopk", "matryoshka", "jumprelu", "layer norm"])
def test_the_model_predicts_better_at_little_cost(world, fields):
    sae = world.sae(**fields)
    before, kept = world.scores(sae), copy.deepcopy(sae)
    tuned = finetune(sae, world.model, world.acts, FinetuneConfig(**QUICK), progress=False)
    after = world.scores(tuned)
    assert after["kl_sae"] < 0.92 * before["kl_sae"]
    assert after["fvu"] < 1.15 * before["fvu"]
    assert after["l0"] == pytest.approx(4, rel=0.15)
    assert after["ce_clean"] == before["ce_clean"]
    assert same(sae, kept)
    assert torch.allclose(tuned.decoder_norms(), torch.ones(64), atol=1e-5)


def test_what_pays_for_sparsity_keeps_the_latents_that_it_has(world):
    sae = copy.deepcopy(world.sae(activation="jumprelu"))
    sae.config = dataclasses.replace(sae.config, k=12)
    tuned = finetune(sae, world.model, world.acts, FinetuneConfig(**QUICK), progress=False)
    assert tuned.config.k == 12
    assert world.scores(tuned)["l0"] == pytest.approx(world.scores(sae)["l0"], rel=0.15)


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_a_transcoder_stands_in_where_its_target_was(world, skip):
    model = copy.deepcopy(world.model)
    torch.manual_seed(0)
    model.middle = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    with torch.no_grad():
        # Again what counts for nothing is large.
        model.middle[2].weight[6:] *= 8
    reading = cut(Harvester(HARVEST, text=TEXTS, model=model, tokenizer=world.tokenizer), 10**6)
    batch, through = next(reading.batches(10**6, 0)), SplicedModel(model, ["before"], ["middle"])
    with through.attached():
        clean = through.clean(batch)
    x, target = (clean.rows[name][batch.kept] for name in ("before", "middle"))
    fields = {"d_out": 16, "skip": skip, "apply_b_dec_to_input": False}
    recipe = saefast.TrainConfig(n_tokens=30_000, batch_size=256, device="cpu", eval_every=0, save_every=0)
    sae = train({"x": x, "target": target}, SAEConfig(d_in=16, n_latents=64, k=4, **fields), recipe, progress=False)

    def kl(sae: SAE) -> float:
        """Of a model whose middle is the transcoder wherever a token has a row."""
        with torch.no_grad(), through.attached():
            put = clean.rows["middle"].clone()
            put[batch.kept] = sae(x).x_hat
            handle = model.middle.register_forward_hook(lambda _m, _a, _o: put)
            now = model(input_ids=batch.ids).logits.log_softmax(-1)
            handle.remove()
            before = clean.logits.log_softmax(-1)
            return float((before.exp() * (before - now)).sum(-1)[batch.kept].mean())

    given = {"hook": "before", "target_hook": "middle", "tokenizer": world.tokenizer, "harvest": HARVEST}
    by = {
        share: finetune(sae, model, TEXTS, FinetuneConfig(**QUICK | {"kl_share": share}), progress=False, **given)
        for share in (0.0, 0.5)
    }
    assert kl(by[0.5]) < 0.95 * kl(by[0.0])
    if skip:
        assert (by[0.5].W_skip - sae.W_skip).abs().max() > 1e-3


def test_shares_of_the_loss_pull_two_ways(world, topk):
    by = {
        share: world.scores(
            finetune(topk, world.model, world.acts, FinetuneConfig(**QUICK | {"kl_share": share}), progress=False)
        )
        for share in (0.0, 0.5, 1.0)
    }
    assert by[0.0]["kl_sae"] > by[0.5]["kl_sae"]
    assert by[0.0]["fvu"] < by[0.5]["fvu"] < by[1.0]["fvu"]


def test_the_model_is_left_as_it_was(world, topk):
    model = copy.deepcopy(world.model).train()
    model.middle.eval()
    model.head.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [(module.training, [p.requires_grad for p in module.parameters()]) for module in model.modules()]
    config = FinetuneConfig(**QUICK | {"n_tokens": 512})
    one = finetune(topk, model, world.acts, config, progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert modes == [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # Modes around the call change nothing either.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert same(one, finetune(topk, model, world.acts, config, progress=False))


def test_halves_are_trained_in_full_and_given_back(world, topk):
    half = copy.deepcopy(topk).bfloat16()
    config = FinetuneConfig(**QUICK | {"n_tokens": 10 * 256, "lr": 1e-4})
    tuned = finetune(half, world.model, world.acts, config, progress=False)
    wide = finetune(copy.deepcopy(half).float(), world.model, world.acts, config, progress=False)
    assert tuned.dtype == torch.bfloat16
    assert same(tuned, wide.bfloat16())


# --- stopping and going on


def interrupted_at(step):
    return lambda line: os.kill(os.getpid(), signal.SIGINT) if line["step"] == step else None


@pytest.mark.parametrize(
    "fields", [KINDS[0], KINDS[1], KINDS[3], KINDS[4]], ids=["topk", "batchtopk", "jumprelu", "normed"]
)
def test_a_stopped_run_goes_on_to_the_bit(world, tmp_path, fields):
    sae = world.sae(**fields)
    config = FinetuneConfig(**QUICK | {"n_tokens": 12 * 256, "save_every": 5})
    arguments = (sae, world.model, world.acts, config)
    whole = finetune(*arguments, tmp_path / "whole", progress=False)
    with pytest.raises(Stopped, match=r"stopped at step 7; resume with finetune\(\.\.\., out_dir="):
        finetune(*arguments, tmp_path / "run", progress=False, on_log=interrupted_at(7))
    assert not (tmp_path / "run" / "sae.safetensors").exists()
    with pytest.raises(InputError, match="already holds a run"):
        finetune(*arguments, tmp_path / "run", progress=False)
    # A kill loses what came after the last checkpoint, and nothing else.
    (tmp_path / "run" / "checkpoints" / "step_00000007" / "state.json").unlink()
    with pytest.warns(RuntimeWarning, match="skipping a damaged checkpoint"):
        again = finetune(*arguments, tmp_path / "run", progress=False, resume=True)
    assert same(whole, again)
    assert same(load(tmp_path / "run"), whole)
    lines = [
        [{k: v for k, v in line.items() if "second" not in k} for line in read_metrics(tmp_path / name)]
        for name in ("whole", "run")
    ]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == list(range(1, 13))
    with pytest.raises(InputError, match="is of a run with another finetune, train: resume with its own"):
        finetune(sae, world.model, world.acts, FinetuneConfig(**QUICK), tmp_path / "run", resume=True, progress=False)


# --- what is refused


def test_what_is_impossible_is_said_in_one_line(world, topk, tmp_path):
    def refused(match, sae=topk, model=world.model, text=world.acts, **more):
        with pytest.raises(InputError, match=match) as error:
            finetune(sae, model, text, FinetuneConfig(**QUICK), progress=False, **more)
        assert "\n" not in str(error.value)

    more = {"tokenizer": world.tokenizer, "harvest": HARVEST}
    refused("hook is None, and the SAE's metadata has no hook_name", SAE(SAEConfig(d_in=16, n_latents=32, k=4)))
    refused("gives rows of width 16, the SAE takes rows of 8", SAE(SAEConfig(d_in=8, n_latents=32, k=4)), hook=HOOK)
    refused("head gives rows of width 66, the SAE gives rows of 16", target_hook="head", text=TEXTS, **more)
    refused("model is a int: expected a causal language model", model=5)
    headless = copy.deepcopy(world.model)
    headless.register_forward_hook(lambda _m, _a, out: SimpleNamespace(last_hidden_state=out.logits))
    refused("gives no logits of tokens: load it with its language-model head", model=headless)
    refused("tokenizer is missing", text=TEXTS)
    refused("it holds middle", hook="embed.0")
    refused("is a harvest already, with settings of its own", harvest=HARVEST)
    refused("resume is True but out_dir is None", resume=True)
    refused("keep_checkpoints is 0", keep_checkpoints=0)
    for bad in ({"kl_share": 1.5}, {"n_tokens": 0}, {"lr": -1.0}, {"save_every": -1}, {"max_norm_multiple": 0.5}):
        with pytest.raises(InputError, match=next(iter(bad))):
            FinetuneConfig(**bad)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text('{"name": "another program"}', encoding="utf-8")
    refused("is no SAE's config", out_dir=tmp_path / "taken")
    assert sorted(os.listdir(tmp_path)) == ["taken"]


def test_a_row_that_is_not_finite_ends_it(world, topk):
    model = copy.deepcopy(world.model)
    with torch.no_grad():
        model.embed[0].weight[7] = math.inf
    with pytest.raises(InputError, match=r"hook middle gives NaN or inf for a token of .*, in torch.float32: run"):
        finetune(topk, model, world.acts, FinetuneConfig(**QUICK), progress=False)


def test_what_is_left_open_is_chosen():
    sae = SAEConfig(d_in=576, n_latents=8192, k=32)
    few, many = chosen(FinetuneConfig(), sae, 150_000), chosen(FinetuneConfig(n_tokens=25_000_000), sae, 10**6)
    assert (few.n_tokens, few.batch_tokens, few.steps) == (150_000, 512, 292)
    assert (many.n_tokens, many.batch_tokens, many.steps) == (25_000_000, 8192, 3051)
    assert chosen(FinetuneConfig(), sae, 100).steps == 1
    assert FinetuneConfig.from_dict(few.to_dict()) == FinetuneConfig(**few.to_dict())
    with pytest.raises(InputError, match=r"unknown keys \['other'\]"):
        FinetuneConfig.from_dict({"other": 1})
