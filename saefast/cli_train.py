"""`saefast train`: activations, or a model and text, into a trained SAE."""

import dataclasses
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from saefast.cli_args import LogLines, parse, peek, watched
from saefast.data.sources import open_source
from saefast.errors import InputError
from saefast.evaluate import DATA, describe_data
from saefast.init import Init
from saefast.recipe import Preset, TrainConfig, preset
from saefast.rundir import read_config
from saefast.sae import SAE, SAEConfig
from saefast.train import Stopped, count_steps, train

ACTIVATIONS = "activations"
# Latents per input dimension where none are asked for.
EXPANSION = 16


@dataclass
class SAEFlags:
    """What the SAE is."""

    n_latents: int | None = None
    """dictionary size; default 16 times the width of the data"""
    k: int = 32
    """latents active per token"""
    d_in: int | None = None
    """width that the rows must have; default whatever they have"""
    activation: Literal["topk"] = "topk"
    """which latents are active (Gao et al. 2024, arXiv 2406.04093)"""
    apply_b_dec_to_input: bool = True
    """encode x - b_dec rather than x"""
    unit_norm_decoder: bool = True
    """training keeps decoder rows at unit norm"""
    rescale_acts_by_decoder_norm: bool = False
    """measure activations in units of the decoder row's norm (SAELens)"""
    init: Init = "tied"
    """how weights begin"""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """of the weights"""

    @classmethod
    def of(cls, config: SAEConfig, sized: bool) -> "SAEFlags":
        """The flags of a config; without its sizes where it only stands for a recipe."""
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(cls)}
        return cls(**values) if sized else cls(**values | {"n_latents": None, "k": cls.k, "d_in": None})

    def config(self, d_in: int, metadata: dict[str, Any]) -> SAEConfig:
        values = dataclasses.asdict(self) | {"d_in": d_in, "n_latents": self.n_latents or EXPANSION * d_in}
        return SAEConfig(metadata=metadata, **values)


@dataclass
class TrainArgs:
    """Train a sparse autoencoder.

    DATA is a folder that `saefast harvest` wrote, or a .npy, .pt or .safetensors file of rows. Without DATA, --model
    and --text are harvested into RUN/activations first. --resume needs no more than --out: data and settings are the
    run's own.
    """

    data: tyro.conf.Positional[str | None] = None
    """folder or file of activations"""
    out: Path = Path("runs/first")
    """the run's folder"""
    preset: Preset = "saefast"
    """recipe that the settings below start from: ours, or a peer's"""
    config: Path | None = None
    """config.json (or run folder) whose settings to start from, instead of a preset"""
    resume: bool = False
    """go on with the run in --out from its newest checkpoint"""
    hook: str | None = None
    """which hook of DATA to train on; with --model, the module to listen to"""
    model: str | None = None
    """Hugging Face name or folder to harvest from"""
    text: tuple[str, ...] = ()
    """files, folders or `datasets` name to harvest from"""
    key: str | None = None
    """which tensor of a file to train on"""
    heldout: float = 0.05
    """share of the rows of a file that is held out (a harvest has chosen its own)"""
    keep_checkpoints: int = 2
    """newest checkpoints to keep"""
    sae: SAEFlags = field(default_factory=SAEFlags)
    train: TrainConfig = field(default_factory=TrainConfig)


def main(argv: list[str]) -> int:
    args = parse(TrainArgs, argv, "train", defaults(argv))
    sae = run_train(args)
    out = shlex.quote(str(args.out))
    print(f"trained {sae.config.n_latents:,} latents, k = {sae.config.k}: {args.out}/sae.safetensors")
    print(f"next: saefast eval {out}")
    return 0


def defaults(argv: list[str]) -> TrainArgs:
    """What a command line starts from: the settings of --config, of the run to resume, or of the preset."""
    config, out = peek(argv, "config"), Path(peek(argv, "out") or TrainArgs.out)
    if config is None and "--resume" in argv and (out / "config.json").is_file():
        config = str(out)
    if config is not None:
        sae_config, train_config = read_config(config)
        return TrainArgs(sae=SAEFlags.of(sae_config, sized=True), train=train_config)
    sae_config, train_config = preset(peek(argv, "preset") or "saefast", d_in=1, n_latents=1, k=1)
    return TrainArgs(sae=SAEFlags.of(sae_config, sized=False), train=train_config)


def run_train(args: TrainArgs) -> SAE:
    """Trains as the arguments say, and records in the SAE's metadata where its data is.

    Raises:
        InputError: anything a user can put right.
        KeyboardInterrupt: Ctrl-C; its text says how to go on.
    """
    path, hook, key, heldout = _data(args)
    source = open_source(path, heldout=heldout, hook=hook, key=key, d_in=args.sae.d_in)
    metadata = describe_data(path, args.out, source, hook=hook, key=key, heldout=heldout)
    sae_config = args.sae.config(source.d_in, metadata)
    shown = watched()
    try:
        return train(
            source,
            sae_config,
            args.train,
            args.out,
            resume=args.resume,
            keep_checkpoints=args.keep_checkpoints,
            progress=shown,
            on_log=None if shown else LogLines(count_steps(source, args.train)),
        )
    except Stopped as stop:
        go_on = f"saefast train --out {shlex.quote(str(args.out))} --resume"
        raise KeyboardInterrupt(f"stopped at step {stop.step} and saved; go on with: {go_on}") from None


def _data(args: TrainArgs) -> tuple[Path, str | None, str | None, float]:
    """What to train on: a path and open_source's arguments. Harvests first where a model or text is given."""
    if args.model is not None or args.text:
        if args.data is not None:
            raise InputError(f"DATA {args.data!r} and --model or --text are given: expected one or the other")
        return _harvested(args), args.hook, None, args.heldout
    if args.data is not None:
        return Path(args.data), args.hook, args.key, args.heldout
    if not args.resume:
        raise InputError("no data: name a folder or file of activations, or --model and --text to harvest from")
    kept = dict(read_config(args.out)[0].metadata.get(DATA) or {})
    if "path" not in kept:
        raise InputError(f"{args.out} does not say what data it was trained on: name it")
    return args.out / kept["path"], kept.get("hook"), kept.get("key"), kept.get("heldout", args.heldout)


def _harvested(args: TrainArgs) -> Path:
    from saefast.cli_harvest import HarvestArgs, describe, run_harvest

    folder = args.out / ACTIVATIONS
    asked = HarvestArgs(out=folder, text=args.text, heldout=args.heldout)
    if args.model is not None:
        asked.model = args.model
    if args.hook is not None:
        asked.hook = (args.hook,)
    print(describe(run_harvest(asked)))
    return folder
