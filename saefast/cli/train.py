"""`saefast train`: activations, or a model and text, into a trained SAE."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from saefast.analysis.evaluation import load_finished
from saefast.cli.args import LogLines, parse, peek, read, watched
from saefast.cli.harvest import HarvestArgs, describe, harvest_config, run_harvest
from saefast.cli.outcome import outcome
from saefast.cli.pairs import picked, targets
from saefast.cli.side_by_side import check_joined, joined, recorded
from saefast.data.mapped_source import MappedSource
from saefast.data.opening import HELDOUT, Shuffle, open_source
from saefast.data.provenance import Recorded, describe_data, recorded_data
from saefast.data.shard_buffer import ShardBuffer
from saefast.data.shards import read_index
from saefast.data.source import TARGET, Source, X, side_by_side
from saefast.engines.config import Preset, TrainConfig, preset
from saefast.engines.recipe import choose, described
from saefast.errors import InputError
from saefast.harvest.config import HarvestConfig
from saefast.harvest.hooks import expand_names
from saefast.models.config import SAEConfig
from saefast.models.sae import CONFIG, SAE
from saefast.training.api import Stopped, train
from saefast.training.progress import read_metrics
from saefast.training.residual import Input, ResidualSource, before_of, describe_residual, stack_of
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
    transcode: str | None = None
    """train a transcoder, which reconstructs this hook from --hook, such as layers.3.mlp from layers.3.mlp:in; of a
    file this key from --key; with --hooks one for each, or a pattern"""
    cross_layer: str | None = None
    """train a cross-layer transcoder: the inputs of all layers, comma-separated or a pattern, such as layers.*.mlp:in,
    and with --transcode their outputs"""
    residual_of: Path | None = None
    """train on what the SAE of this run leaves over, on its data where none is named; eval adds both up"""
    residual_input: Input = "error"
    """with --residual-of: encode what is left over, or x itself, whose latents then reconstruct what is left over"""
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
        widths, more = self.sae.keywords.get("crosscode_widths"), {}
        if self.cross_layer and "*" not in self.cross_layer:
            more["n_layers"] = self.cross_layer.count(",") + 1
        # Wide, and something that layers can share.
        layers = more.get("n_layers") or self.sae.keywords.get("n_layers") or 1
        wide = _WIDEST // layers * layers
        maps = (self.transcode and not self.cross_layer) or (self.residual_of and self.residual_input == "x")
        if self.d_out or maps:
            more["d_out"] = self.d_out or wide
        return self.sae_config(self.d_in or (sum(widths) if widths else wide), {}, **more)

    @property
    def d_out(self) -> int | None:
        """Width that the target must have; None is any."""
        return self.sae.keywords.get("d_out")

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
    _check_flags(argv)
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


def _check_flags(argv: list[str]) -> None:
    """Raises InputError for what could not be told from a default once it is read."""
    if peek(argv, "transcode") is not None and any(w.replace("_", "-") == "--apply-b-dec-to-input" for w in argv):
        raise InputError(
            "--apply-b-dec-to-input and --transcode are given: the b_dec of a transcoder is the centre of its targets, "
            "so x is encoded as it is; leave the first out"
        )


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
    check_joined(_joint(args))
    _check_residual(args)
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
    if args.crosscode or args.cross_layer:
        return {"": _side_by_side(args, path, known)}
    folders = args.folders(known)
    for hook, target in targets(folders, args.transcode, known).items():
        folder, names = folders[hook], picked(hook, args.key, target)
        source = open_source(
            path,
            heldout=args.heldout,
            d_in=args.d_in,
            d_out=args.d_out,
            skip_bad_shards=args.skip_bad_shards,
            shuffle=_shuffle(args, folder),
            **names,
        )
        for bad in source.folder.skipped if isinstance(source, MappedSource | ShardBuffer) and source.folder else []:
            print(f"saefast: skipped: {bad.reason}", file=sys.stderr)
        if source.source_name in trained:
            raise InputError(f"--hooks {args.hooks}: two of them are {source.source_name}; name each once")
        trained.add(source.source_name)
        metadata = describe_data(path, folder, source, heldout=args.heldout, **names)
        members[hook or ""] = _member(args, source, folder, metadata)
    return members


def _joint(args: TrainArgs) -> dict[str, Any]:
    """The flags that say what lies side by side, and those that would say otherwise."""
    names = ("crosscode", "cross_layer", "transcode", "beside", "hook", "hooks", "key")
    return {name: getattr(args, name) for name in names}


def _side_by_side(args: TrainArgs, path: Path, known: list[str]) -> Member:
    """One SAE on rows of several layers or models."""
    places, hooks = (path, *args.beside), joined(_joint(args), known)
    source = open_source(
        places if args.beside else path,
        hooks=hooks,
        d_in=args.d_in,
        skip_bad_shards=args.skip_bad_shards,
        shuffle=_shuffle(args, args.out),
    )
    metadata = describe_data(places, args.out, source, hook=None, key=None, heldout=args.heldout, hooks=hooks)
    return Member(source, _joint_config(args, source, metadata), args.train)


def _joint_config(args: TrainArgs, source: Source, metadata: dict[str, Any]) -> SAEConfig:
    if args.crosscode:
        return args.sae_config(source.d_in, metadata, crosscode_widths=source.part_widths())
    d_out = source.widths[TARGET]
    more = {"n_layers": len(source.part_widths())} | ({"d_out": d_out} if d_out != source.d_in else {})
    return args.sae_config(source.d_in, metadata, **more)


def _live_side_by_side(args: TrainArgs, config: HarvestConfig, text: Any) -> Member:
    from saefast.harvest.live import live_source
    from saefast.harvest.reharvest import check_resumed, describe_live

    source = live_source(config, joined(_joint(args)), text=text)
    if args.resume and (args.out / CONFIG).is_file():
        check_resumed(args.out, read_config(args.out)[0].metadata, source.identity)
    hooks = {tensor: list(names) for tensor, names in source.hooks.items()}
    metadata = describe_live(config, args.text, hooks, source.identity)
    return Member(source, _joint_config(args, source, metadata), args.train)


def _member(args: TrainArgs, source: Source, folder: Path, metadata: dict[str, Any]) -> Member:
    """What to train on a source's rows, or on what is left over of them. A run that goes on is what it began as."""
    if args.residual_of is not None:
        stack = stack_of(args.residual_of, load_finished(args.residual_of))
        source = ResidualSource(source, stack, args.residual_input)
        metadata = metadata | describe_residual(args.residual_of, stack, args.residual_input)
    begun = args.resume and (folder / CONFIG).is_file()
    more = {} if begun or TARGET not in source.widths else {"d_out": source.widths[TARGET]}
    return Member(source, args.sae_config(source.d_in, metadata, **more), args.train)


def _check_residual(args: TrainArgs) -> None:
    """Raises InputError for a residual SAE of nothing, of itself, or of several hooks."""
    run = args.residual_of
    if run is None:
        if args.residual_input != "error":
            raise InputError(f"--residual-input {args.residual_input} goes with --residual-of RUN, which is not given")
        return
    if several := args.hooks or args.crosscode or args.cross_layer:
        raise InputError(f"--residual-of {run} is of one hook, and {several} are several: train one by one, by --hook")
    if run.resolve() == args.out.resolve():
        raise InputError(f"--residual-of {run} is --out too: a residual SAE needs a folder of its own")
    load_finished(run)


def _live_members(args: TrainArgs) -> dict[str, Member]:
    """What to train, by hook, from a model that is running."""
    from saefast.harvest.reharvest import as_begun, check_resumed, describe_live

    if args.data is not None:
        raise InputError(f"DATA {args.data!r} and --live are given: --live trains on what --model reads in --text")
    if args.hooks is not None and args.transcode is not None:
        raise InputError("--live trains one transcoder at a time: give --hook, or harvest first and leave --live out")
    config, text = harvest_config(_harvest_args(args))
    # Of several runs the folders are not known yet: a hook may be a pattern.
    configs = [args.out / CONFIG, *sorted(args.out.glob(f"*/{CONFIG}"))] if args.resume else []
    for run in [place.parent for place in configs if place.is_file()]:
        config = as_begun(config, run, read_config(run)[0].metadata)
    if args.crosscode or args.cross_layer:
        return {"": _live_side_by_side(args, config, text)}
    members = {}
    for hook, (source, hooks) in _live_sources(args, config, text).items():
        folder = args.out if args.hooks is None else args.out / hook
        if args.resume and (folder / CONFIG).is_file():
            check_resumed(folder, read_config(folder)[0].metadata, source.identity)
        metadata = describe_live(config, args.text, hooks, source.identity)
        members[hook] = _member(args, source, folder, metadata)
    return members


def _live_sources(args: TrainArgs, config: HarvestConfig, text: Any) -> dict[str, tuple[Any, Any]]:
    """A source for each SAE, by its hook, and the hooks that are its tensors."""
    from saefast.harvest.live import live_source, live_sources

    names = picked(args.hook, args.key, args.transcode)["hooks"]
    if names is not None:
        return {str(args.hook): (live_source(config, names, text=text), names)}
    return {hook: (source, hook) for hook, source in live_sources(config, text=text).items()}


def _as_recorded(args: TrainArgs) -> TrainArgs:
    """The arguments with what the run says that goes on, or the one whose residual is asked for, where they do not."""
    folders = args.folders([member.name for member in _members_in(args.out)])
    run = next(iter(folders.values()))
    if args.resume and (run / CONFIG).is_file():
        before = before_of(run, read_config(run)[0].metadata)
        if before is not None and args.residual_of is None:
            args = dataclasses.replace(args, residual_of=run / before["run"], residual_input=before["input"])
    if args.live or args.data or args.model or args.text:
        return args
    if args.resume:
        return _with_data_of(args, list(folders.values()))
    return args if args.residual_of is None else _with_data_of(args, [args.residual_of])


def _with_data_of(args: TrainArgs, runs: list[Path]) -> TrainArgs:
    """The arguments with the data of runs: of one that --hook or --key names something of, that."""
    kept = _recorded_in(runs[0])
    hooks, keys = _names(kept, "hooks"), _names(kept, "keys")
    if live := kept.get("live"):
        named: dict[str, Any] = dict(live=True, model=live["model"], text=tuple(live["text"]), heldout=live["heldout"])
    else:
        key = keys.get(X, kept.get("key"))
        named = dict(data=str(runs[0] / kept["path"]), key=key, heldout=kept.get("heldout", args.heldout))
        named["beside"] = tuple(runs[0] / other for other in kept.get("beside", []))
    if (joint := recorded(kept.get("hooks"))) is not None:
        return dataclasses.replace(args, hook=None, **joint, **named)
    if args.hooks is None:
        named["hook"] = hooks.get(X, kept.get("hook"))
    targets = [_names(_recorded_in(run), name).get(TARGET) for run in runs for name in ("hooks", "keys")]
    named["transcode"] = ",".join(filter(None, targets)) or None
    return dataclasses.replace(args, **named)


def _recorded_in(run: Path) -> Recorded:
    kept = recorded_data(read_config(run)[0].metadata, run)
    if kept is None:
        raise InputError(f"{run} does not say what data it was trained on: name it")
    return kept


def _names(kept: Recorded, what: Literal["hooks", "keys"]) -> dict[str, str]:
    """The hooks or keys of a run on several tensors, by tensor."""
    return {tensor: ",".join(names) for tensor, names in side_by_side(kept.get(what) or {}).items()}


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
    joint = args.crosscode or args.cross_layer
    given = joint.split(",") if joint else args.folders()
    named = [hook for hook in given if hook is not None]
    named += args.transcode.split(",") if args.transcode else []
    hooks = tuple(dict.fromkeys(named)) or HarvestConfig.hooks
    settings = HarvestConfig(model=model, heldout=args.heldout)
    return HarvestArgs(args.out / ACTIVATIONS, args.text, hooks, settings)
