"""`saefast train`: activations, or a model and text, into a trained SAE."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from saefast.cli.args import LogLines, parse, peek, read, watched
from saefast.cli.harvest import HarvestArgs, describe, harvest_config, run_harvest
from saefast.cli.outcome import outcome
from saefast.cli.side_by_side import check_joined, joined, recorded
from saefast.data.mapped_source import MappedSource
from saefast.data.opening import HELDOUT, Shuffle, open_source
from saefast.data.provenance import describe_data, recorded_data
from saefast.data.shard_buffer import ShardBuffer
from saefast.data.shards import read_index
from saefast.data.source import Source, X
from saefast.engines.config import Preset, TrainConfig, preset
from saefast.engines.recipe import choose, described
from saefast.errors import InputError
from saefast.harvest.config import HarvestConfig
from saefast.harvest.hooks import expand_names
from saefast.models.config import SAEConfig
from saefast.models.sae import CONFIG, SAE
from saefast.training.api import Stopped, train
from saefast.training.progress import read_metrics
from saefast.training.run_folder import read_config
from saefast.training.several import Member, check_names, train_many

ACTIVATIONS = "activations"
# Latents per input dimension where none are asked for.
EXPANSION = 16
_WIDEST = 1 << 16


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
    """several hooks, comma-separated: one SAE each in RUN/HOOK, trained side by side from one pass; layers.* is one for
    each block"""
    crosscode: str | None = None
    """several hooks, comma-separated, or a pattern: one crosscoder of all of them, with a decoder for each"""
    beside: tuple[Path, ...] = ()
    """with --crosscode: harvests of other models over DATA's text, whose rows lie beside DATA's; --crosscode names one
    hook for each folder, DATA's first, or one for all"""
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
    n_latents: int | None = None
    """dictionary size; default 16 times the width of the data"""
    d_in: int | None = None
    """width that the rows must have; default: any"""
    sae: partial[SAEConfig] = field(default_factory=lambda: partial(SAEConfig))
    """What the SAE is."""
    train: TrainConfig = field(default_factory=TrainConfig)

    def sae_config(self, d_in: int, metadata: dict[str, Any], **more: Any) -> SAEConfig:
        """For rows of this width. Raises InputError for what no SAE can be."""
        n_latents = EXPANSION * d_in if self.n_latents is None else self.n_latents
        return self.sae(d_in=d_in, n_latents=n_latents, metadata=metadata, **more)

    def widest(self) -> SAEConfig:
        """For the widest rows there may be, before the data is known: what this refuses, no data makes possible."""
        widths = self.sae.keywords.get("crosscode_widths")
        return self.sae_config(self.d_in or (sum(widths) if widths else _WIDEST), {})

    def folders(self, known: Sequence[str] = ()) -> dict[str | None, Path]:
        """Where each SAE goes, by its hook; None is the only one that the data has. known: hooks that patterns mean."""
        if self.hooks is None:
            return {self.hook: self.out}
        names = self.hooks.split(",")
        return {name: self.out / name for name in (expand_names(known, names) if known else names)}


def main(argv: list[str]) -> int:
    args = parse(TrainArgs, argv, "train", defaults(argv))
    for folder, sae in run_train(args).items():
        print(f"trained {sae.config.n_latents:,} latents, k = {sae.config.k}: {folder}/sae.safetensors")
        print("\n".join(f"  {line}" for line in outcome(read_metrics(folder))))
        print(f"next: saefast eval {shlex.quote(str(folder))}")
    return 0


def defaults(argv: list[str]) -> TrainArgs:
    """What a command line starts from: the settings of --config, of the run to resume, or of the preset."""
    config, out = peek(argv, "config"), Path(peek(argv, "out") or TrainArgs.out)
    runs: list[str | Path] = [] if config is None else [config]
    if config is None and "--resume" in argv:
        every = [out] if peek(argv, "hooks") is None else _members_in(out)
        runs = [run for run in every if (run / CONFIG).is_file()]
    if runs:
        return _as_begun(runs)
    name = peek(argv, "preset") or "saefast"
    sae, train = preset(name, d_in=_WIDEST, n_latents=EXPANSION * _WIDEST)
    begun = TrainArgs(sae=_unsized(sae), train=train)
    # How a recipe trains depends on the architecture, which other flags name.
    asked, _ = read(TrainArgs, argv, "train", begun)
    _, train = preset(name, **vars(asked.widest()))
    return dataclasses.replace(begun, train=train)


def _as_begun(runs: list[str | Path]) -> TrainArgs:
    """What runs that were begun together have been told."""
    saes, trains = zip(*map(read_config, runs), strict=True)
    args = TrainArgs(sae=_unsized(saes[0]), train=trains[0])
    if len({(sae.d_in, sae.n_latents) for sae in saes}) > 1:
        # The hooks have several widths, and each SAE the size that goes with its own.
        return args
    return dataclasses.replace(args, n_latents=saes[0].n_latents, d_in=saes[0].d_in)


def _members_in(out: Path) -> list[Path]:
    """The folders of the SAEs that were begun in one folder."""
    return sorted(config.parent for config in out.glob(f"*/{CONFIG}"))


def _unsized(config: SAEConfig) -> partial[SAEConfig]:
    """All of it but what the data decides."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return partial(SAEConfig, **{name: values[name] for name in values.keys() - {"d_in", "n_latents", "metadata"}})


def run_train(args: TrainArgs) -> dict[Path, SAE]:
    """Trains as the arguments say, and records in each SAE's metadata where its data is. The SAEs by their folders.

    Raises:
        InputError: anything a user can put right.
        KeyboardInterrupt: Ctrl-C; its text says how to go on.
    """
    if args.hooks is not None:
        check_names(args.hooks.split(","))
        if args.hook is not None:
            raise InputError(f"--hook {args.hook} and --hooks {args.hooks} are given: expected one or the other")
    if args.hook is not None and "*" in args.hook:
        raise InputError(f"--hook {args.hook} means several hooks: --hooks {args.hook} trains an SAE for each of them")
    check_joined({name: getattr(args, name) for name in ("crosscode", "beside", "hook", "hooks", "key")})
    args = _as_recorded(args)
    # Before a model is loaded and an hour harvested.
    args.widest()
    members = _live_members(args) if args.live else _members(args)
    try:
        return _trained(args, members)
    finally:
        for member in members.values():
            member.batches.close()


def _trained(args: TrainArgs, members: dict[str, Member]) -> dict[Path, SAE]:
    shown, members = watched(), {hook: _chosen(member) for hook, member in members.items()}
    options: dict[str, Any] = dict(resume=args.resume, keep_checkpoints=args.keep_checkpoints, progress=shown)
    try:
        if args.hooks is not None:
            return {args.out / name: sae for name, sae in train_many(members, args.out, **options).items()}
        (member,) = members.values()
        lines = None if shown else LogLines()
        return {args.out: train(*member, args.out, on_log=lines, **options)}
    except Stopped as stop:
        again = [
            f"--out {shlex.quote(str(args.out))} --resume",
            *([f"--hooks {shlex.quote(args.hooks)}"] if args.hooks else []),
        ]
        go_on = f"saefast train {' '.join(again)}"
        raise KeyboardInterrupt(f"stopped at step {stop.step} and saved; go on with: {go_on}") from None


def _chosen(member: Member) -> Member:
    recipe = choose(member.sae_config, member.train_config, member.batches.n_rows)
    print(f"recipe: {described(recipe)}", flush=True)
    return member._replace(train_config=recipe)


def _members(args: TrainArgs) -> dict[str, Member]:
    """What to train, by hook, from data on disk."""
    path, members = _data(args), {}
    trained = set()
    known = [hook["name"] for hook in read_index(path)["hooks"]] if (path / "index.json").is_file() else []
    if args.crosscode is not None:
        return {"": _crosscoder(args, path, known)}
    for hook, folder in args.folders(known).items():
        source = open_source(
            path,
            heldout=args.heldout,
            hook=hook,
            key=args.key,
            d_in=args.d_in,
            skip_bad_shards=args.skip_bad_shards,
            shuffle=_shuffle(args, folder),
        )
        for bad in source.folder.skipped if isinstance(source, MappedSource | ShardBuffer) and source.folder else []:
            print(f"saefast: skipped: {bad.reason}", file=sys.stderr)
        if source.source_name in trained:
            raise InputError(f"--hooks {args.hooks}: two of them are {source.source_name}; name each once")
        trained.add(source.source_name)
        metadata = describe_data(path, folder, source, hook=hook, key=args.key, heldout=args.heldout)
        members[hook or ""] = Member(source, args.sae_config(source.d_in, metadata), args.train)
    return members


def _crosscoder(args: TrainArgs, path: Path, known: list[str]) -> Member:
    """One crosscoder on rows that lie side by side."""
    places, shuffle = (path, *args.beside), _shuffle(args, args.out)
    hooks = joined(str(args.crosscode), known, len(places))
    source = open_source(
        places if args.beside else path,
        hooks=hooks,
        d_in=args.d_in,
        skip_bad_shards=args.skip_bad_shards,
        shuffle=shuffle,
    )
    metadata = describe_data(places, args.out, source, hook=None, key=None, heldout=args.heldout, hooks=hooks)
    return Member(source, _crosscoder_config(args, source, metadata), args.train)


def _crosscoder_config(args: TrainArgs, source: Source, metadata: dict[str, Any]) -> SAEConfig:
    return args.sae_config(source.d_in, metadata, crosscode_widths=source.part_widths())


def _live_crosscoder(args: TrainArgs, config: HarvestConfig, text: Any) -> Member:
    from saefast.harvest.live import live_source
    from saefast.harvest.reharvest import check_resumed, describe_live

    source = live_source(config, joined(str(args.crosscode), (), 1), text=text)
    if args.resume and (args.out / CONFIG).is_file():
        check_resumed(args.out, read_config(args.out)[0].metadata, source.identity)
    metadata = describe_live(config, args.text, {X: list(source.hooks[X])}, source.identity)
    return Member(source, _crosscoder_config(args, source, metadata), args.train)


def _live_members(args: TrainArgs) -> dict[str, Member]:
    """What to train, by hook, from a model that is running."""
    from saefast.harvest.live import live_sources
    from saefast.harvest.reharvest import as_begun, check_resumed, describe_live

    if args.data is not None:
        raise InputError(f"DATA {args.data!r} and --live are given: --live trains on what --model reads in --text")
    config, text = harvest_config(_harvest_args(args))
    # Of several runs the folders are not known yet: a hook may be a pattern.
    configs = [args.out / CONFIG, *sorted(args.out.glob(f"*/{CONFIG}"))] if args.resume else []
    for run in [place.parent for place in configs if place.is_file()]:
        config = as_begun(config, run, read_config(run)[0].metadata)
    if args.crosscode is not None:
        return {"": _live_crosscoder(args, config, text)}
    sources, members = live_sources(config, text=text), {}
    for hook, source in sources.items():
        folder = args.out if args.hooks is None else args.out / hook
        if args.resume and (folder / CONFIG).is_file():
            check_resumed(folder, read_config(folder)[0].metadata, source.identity)
        metadata = describe_live(config, args.text, hook, source.identity)
        members[hook] = Member(source, args.sae_config(source.d_in, metadata), args.train)
    return members


def _as_recorded(args: TrainArgs) -> TrainArgs:
    """The arguments of a resume that names no data, with the run's own."""
    if not args.resume or args.live or args.data or args.model or args.text:
        return args
    run = next(iter(args.folders([member.name for member in _members_in(args.out)]).values()))
    kept = recorded_data(read_config(run)[0].metadata, run)
    if kept is None:
        raise InputError(f"{run} does not say what data it was trained on: name it")
    hook = None if args.hooks else kept.get("hook")
    if live := kept.get("live"):
        named: dict[str, Any] = dict(live=True, model=live["model"], text=tuple(live["text"]), heldout=live["heldout"])
    else:
        named = dict(data=str(run / kept["path"]), key=kept.get("key"), heldout=kept.get("heldout", args.heldout))
        named["beside"] = tuple(run / other for other in kept.get("beside", []))
    return dataclasses.replace(args, hook=hook, crosscode=recorded(kept.get("hooks")), **named)


def _data(args: TrainArgs) -> Path:
    """What to train on. Harvests first where a model or text is given."""
    if args.model is not None or args.text:
        if args.beside:
            raise InputError(
                "--beside and --model or --text are given: harvest each model into a folder of its own first, with "
                "saefast harvest, and name these"
            )
        if args.data is not None:
            raise InputError(f"DATA {args.data!r} and --model or --text are given: expected one or the other")
        if args.key is not None:
            raise InputError(f"--key {args.key} picks a tensor of a file, and --model or --text is given: leave it out")
        asked = _harvest_args(args)
        print(describe(run_harvest(asked)))
        return asked.out
    if args.data is None:
        raise InputError("no data: name a folder or file of activations, or --model and --text to harvest from")
    return Path(args.data)


def _shuffle(args: TrainArgs, run: Path) -> Shuffle:
    """As asked; a run that goes on keeps its own, which "auto" may choose otherwise on another machine."""
    if args.shuffle != "auto" or not args.resume or not (run / CONFIG).is_file():
        return args.shuffle
    kept = recorded_data(read_config(run)[0].metadata, run)
    return args.shuffle if kept is None else kept.get("shuffle", args.shuffle)


def _harvest_args(args: TrainArgs) -> HarvestArgs:
    model = HarvestConfig.model if args.model is None else args.model
    given = args.crosscode.split(",") if args.crosscode else args.folders()
    hooks = tuple(hook for hook in given if hook is not None) or HarvestConfig.hooks
    settings = HarvestConfig(model=model, heldout=args.heldout)
    return HarvestArgs(args.out / ACTIVATIONS, args.text, hooks, settings)
