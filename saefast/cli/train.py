"""`saefast train`: activations, or a model and text, into a trained SAE."""

import dataclasses
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from saefast.cli.args import LogLines, parse, peek, watched
from saefast.cli.harvest import HarvestArgs, describe, harvest_config, run_harvest
from saefast.data.mapped_source import MappedSource
from saefast.data.opening import HELDOUT, Shuffle, open_source
from saefast.data.provenance import describe_data, recorded_data
from saefast.data.shard_buffer import ShardBuffer
from saefast.data.source import Source
from saefast.engines.config import Preset, TrainConfig, preset
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.init import Init
from saefast.models.sae import CONFIG, SAE
from saefast.training.api import Stopped, count_steps, train
from saefast.training.run_folder import read_config
from saefast.training.several import Member, check_names, train_many

ACTIVATIONS = "activations"
# Latents per input dimension where none are asked for.
EXPANSION = 16
_WIDEST = 1 << 16


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

    data: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = None
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
    hooks: str | None = None
    """several hooks, comma-separated: one SAE each in RUN/HOOK, trained side by side off one pass"""
    live: bool = False
    """train while --model reads --text; no activations are written (needs --n-tokens); eval harvests some"""
    shuffle: Shuffle = "auto"
    """mapped draws from the whole folder at random; buffer streams it through a reservoir, for folders over memory"""
    skip_bad_shards: bool = False
    """leave out shards that are missing or damaged, and say which"""
    model: str | None = None
    """Hugging Face name or folder to harvest from"""
    text: tuple[str, ...] = ()
    """files, folders or `datasets` name to harvest from"""
    key: str | None = None
    """which tensor of a file to train on"""
    heldout: float = HELDOUT
    """share of the rows of a file that is held out (a harvest has chosen its own)"""
    keep_checkpoints: int = 2
    """newest checkpoints to keep"""
    sae: SAEFlags = field(default_factory=SAEFlags)
    train: TrainConfig = field(default_factory=TrainConfig)


def main(argv: list[str]) -> int:
    args = parse(TrainArgs, argv, "train", defaults(argv))
    for folder, sae in run_train(args).items():
        print(f"trained {sae.config.n_latents:,} latents, k = {sae.config.k}: {folder}/sae.safetensors")
        print(f"next: saefast eval {shlex.quote(str(folder))}")
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


def run_train(args: TrainArgs) -> dict[Path, SAE]:
    """Trains as the arguments say, and records in each SAE's metadata where its data is. The SAEs by their folders.

    Raises:
        InputError: anything a user can put right.
        KeyboardInterrupt: Ctrl-C; its text says how to go on.
    """
    names = [] if args.hooks is None else args.hooks.split(",")
    if args.hooks is not None:
        check_names(names)
        if args.hook is not None:
            raise InputError(f"--hook {args.hook} and --hooks {args.hooks} are given: expected one or the other")
    args = _as_recorded(args, names)
    # Before a model is loaded and an hour harvested: what no SAE of the widest rows could have.
    args.sae.config(args.sae.d_in or _WIDEST, {})
    members = _live_members(args, names) if args.live else _members(args, names)
    try:
        return _trained(args, names, members)
    finally:
        for member in members.values():
            member.batches.close()


def _trained(args: TrainArgs, names: list[str], members: dict[str, Member]) -> dict[Path, SAE]:
    try:
        if names:
            saes = train_many(
                members, args.out, resume=args.resume, keep_checkpoints=args.keep_checkpoints, progress=watched()
            )
            return {args.out / name: sae for name, sae in saes.items()}
        return {args.out: _train_one(args, next(iter(members.values())))}
    except Stopped as stop:
        again = [f"--out {shlex.quote(str(args.out))} --resume", *([f"--hooks {args.hooks}"] if names else [])]
        go_on = f"saefast train {' '.join(again)}"
        raise KeyboardInterrupt(f"stopped at step {stop.step} and saved; go on with: {go_on}") from None


def _train_one(args: TrainArgs, member: Member) -> SAE:
    shown = watched()
    return train(
        *member,
        args.out,
        resume=args.resume,
        keep_checkpoints=args.keep_checkpoints,
        progress=shown,
        on_log=None if shown else LogLines(count_steps(member.batches, args.train)),
    )


def _members(args: TrainArgs, names: list[str]) -> dict[str, Member]:
    """What to train, by hook, off data on disk."""
    path, hook, key, heldout = _data(args, names)
    members, trained = {}, set()
    wanted: list[str | None] = [*names] or [hook]
    for name in wanted:
        folder = args.out / name if names and name else args.out
        source = open_source(
            path,
            heldout=heldout,
            hook=name,
            key=key,
            d_in=args.sae.d_in,
            skip_bad_shards=args.skip_bad_shards,
            shuffle=_shuffle(args, folder),
        )
        _report_skipped(source)
        if source.source_name in trained:
            raise InputError(f"--hooks {args.hooks}: two of them are {source.source_name}; name each once")
        trained.add(source.source_name)
        metadata = describe_data(path, folder, source, hook=name, key=key, heldout=heldout)
        members[name or ""] = Member(source, args.sae.config(source.d_in, metadata), args.train)
    return members


def _live_members(args: TrainArgs, names: list[str]) -> dict[str, Member]:
    """What to train, by hook, off a model that is running."""
    from saefast.harvest.live import live_sources
    from saefast.harvest.reharvest import describe_live

    if args.data is not None:
        raise InputError(f"DATA {args.data!r} and --live are given: --live trains on what --model reads in --text")
    asked = _harvest_args(args, names)
    config, text = harvest_config(asked)
    sources = live_sources(config, text=text)
    return {
        name: Member(source, args.sae.config(source.d_in, describe_live(config, asked.text, name)), args.train)
        for name, source in sources.items()
    }


def _as_recorded(args: TrainArgs, names: list[str]) -> TrainArgs:
    """The arguments of a resume that names no data, with the run's own where it trained live."""
    run = args.out / names[0] if names else args.out
    if not args.resume or args.live or args.data or args.model or args.text or not (run / CONFIG).is_file():
        return args
    kept = recorded_data(read_config(run)[0].metadata, run)
    if kept is None or "live" not in kept:
        return args
    live, hook = kept["live"], None if names else kept.get("hook")
    return dataclasses.replace(
        args, live=True, model=live["model"], text=tuple(live["text"]), heldout=live["heldout"], hook=hook
    )


def _report_skipped(source: Source) -> None:
    for bad in source.folder.skipped if isinstance(source, MappedSource | ShardBuffer) and source.folder else []:
        print(f"saefast: skipped: {bad.reason}", file=sys.stderr)


def _data(args: TrainArgs, names: list[str]) -> tuple[Path, str | None, str | None, float]:
    """What to train on: a path and open_source's arguments. Harvests first where a model or text is given."""
    if args.model is not None or args.text:
        if args.data is not None:
            raise InputError(f"DATA {args.data!r} and --model or --text are given: expected one or the other")
        if args.key is not None:
            raise InputError(f"--key {args.key} picks a tensor of a file, and --model or --text is given: leave it out")
        return _harvested(args, names), args.hook, None, args.heldout
    if args.data is not None:
        return Path(args.data), args.hook, args.key, args.heldout
    if not args.resume:
        raise InputError("no data: name a folder or file of activations, or --model and --text to harvest from")
    run = args.out / names[0] if names else args.out
    kept = recorded_data(read_config(run)[0].metadata, run)
    if kept is None:
        raise InputError(f"{run} does not say what data it was trained on: name it")
    return run / kept["path"], kept.get("hook"), kept.get("key"), kept.get("heldout", args.heldout)


def _shuffle(args: TrainArgs, run: Path) -> Shuffle:
    """As asked; a run that goes on keeps its own, which "auto" may choose otherwise on another machine."""
    if args.shuffle != "auto" or not args.resume or not (run / CONFIG).is_file():
        return args.shuffle
    kept = recorded_data(read_config(run)[0].metadata, run)
    return args.shuffle if kept is None else kept.get("shuffle", args.shuffle)


def _harvested(args: TrainArgs, names: list[str]) -> Path:
    asked = _harvest_args(args, names)
    print(describe(run_harvest(asked)))
    return asked.out


def _harvest_args(args: TrainArgs, names: list[str]) -> HarvestArgs:
    asked = HarvestArgs(out=args.out / ACTIVATIONS, text=args.text, heldout=args.heldout)
    if args.model is not None:
        asked.model = args.model
    if names or args.hook is not None:
        asked.hook = tuple(names) or (str(args.hook),)
    return asked
