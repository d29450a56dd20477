"""The matrix of docs/models.md: what is checked of which architecture, against forward passes written by hand.

    PYTHONPATH=tests:. python -m model_matrix [--write]

Prints the table; --write puts it into the page. Each check raises AssertionError where it does not hold.
"""

import argparse
import contextlib
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import architectures
import tiny_models
import torch
from torch import Tensor, nn

from saefast.harvest.capture import runner_for
from saefast.harvest.hooks import find_hook
from saefast.harvest.to_disk import HarvestConfig, harvest_batches
from saefast.metrics.language_model import TokenBatch, lm_scores, spliced
from saefast.places import Place, Taken, visited

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- written by python -m model_matrix -->", "<!-- end -->"

# Name in tests/architectures.py -> what the page calls it, and lists of blocks where `layers` is not enough.
SHOWN: dict[str, tuple[str, tuple[str, ...]]] = {
    "gpt2": ("GPT-2", ("layers",)),
    "llama": ("Llama", ("layers",)),
    "mistral": ("Mistral", ("layers",)),
    "mixtral": ("Mixtral", ("layers",)),
    "qwen2": ("Qwen 2", ("layers",)),
    "qwen3": ("Qwen 3", ("layers",)),
    "qwen2moe": ("Qwen 2 MoE", ("layers",)),
    "gemma2": ("Gemma 2", ("layers",)),
    "gemma3": ("Gemma 3", ("layers",)),
    "phi": ("Phi", ("layers",)),
    "phi3": ("Phi-3", ("layers",)),
    "neox": ("GPT-NeoX (Pythia)", ("layers",)),
    "gptj": ("GPT-J", ("layers",)),
    "neo": ("GPT-Neo", ("layers",)),
    "opt": ("OPT", ("layers",)),
    "bloom": ("BLOOM", ("layers",)),
    "falcon": ("Falcon", ("layers",)),
    "mpt": ("MPT", ("layers",)),
    "olmo": ("OLMo", ("layers",)),
    "olmo2": ("OLMo 2", ("layers",)),
    "cohere": ("Cohere", ("layers",)),
    "mamba": ("Mamba", ("layers",)),
    "bert": ("BERT", ("layers",)),
    "roberta": ("RoBERTa", ("layers",)),
    "distilbert": ("DistilBERT", ("layers",)),
    "albert": ("ALBERT", ("albert.encoder.albert_layer_groups.0.albert_layers.0@*",)),
    "esm": ("ESM", ("layers",)),
    "deberta": ("DeBERTa v2", ("layers",)),
    "modernbert": ("ModernBERT", ("layers",)),
    "xlnet": ("XLNet", ("layers",)),
    "bart with a head": ("BART", ("model.encoder.layers", "model.decoder.layers")),
    "t5 with a head": ("T5", ("encoder.block", "decoder.block")),
    "qwen2vl": ("Qwen2-VL, text", ("layers",)),
    "gemma3 with vision": ("Gemma 3 with vision, text", ("layers",)),
    "llava": ("LLaVA, text", ("layers",)),
}
COLUMNS = ("outputs", "inputs", "padding", "company", "in = out before", "train mode", "splice", "turns")

# Words a text: no two alike, none of the number of heads.
LENGTHS = (12, 9, 6, 5, 3)
# Sums of some hundred float32 products in another order: that many roundings of 2⁻²⁴ each.
ROUNDING = 300 * 2**-24


class Plain(NamedTuple):
    """A forward pass written by hand over one sequence: values (T, d) of its tokens at every place that has some,
    hidden states (T, d) as the model itself gives them, how often each module runs."""

    values: dict[Place, Tensor]
    states: list[list[Tensor]]
    calls: dict[str, int]


class Model(NamedTuple):
    """blocks: per stack its blocks in order."""

    model: Any
    blocks: list[list[Place]]

    @property
    def every(self) -> list[Place]:
        return [block for stack in self.blocks for block in stack]

    @property
    def decodes(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)


def built(name: str) -> Model:
    model = architectures.build(name)
    with warnings.catch_warnings():
        # Short names of a model with a vision tower are said to mean its text.
        warnings.simplefilter("ignore", RuntimeWarning)
        return Model(model, [_blocks(model, stack) for stack in SHOWN[name][1]])


def _blocks(model: Any, stack: str) -> list[Place]:
    if stack.endswith("@*"):
        return [Place.read(stack.replace("*", str(turn))) for turn in range(2)]
    return [find_hook(model, f"{stack}.{number}").places[0] for number in range(2)]


def inputs(of: Model, ids: Tensor) -> dict[str, Tensor]:
    """What the model's forward takes for ids (B, T), none of them padding."""
    if not of.decodes:
        return {"input_ids": ids}
    start = torch.full((len(ids), 1), of.model.config.decoder_start_token_id)
    return {"input_ids": ids, "decoder_input_ids": torch.cat([start, ids], 1)}


@torch.no_grad()
def plain(of: Model, ids: Tensor) -> Plain:
    """ids: (T,)."""
    given: dict[tuple[str, Any], list[Any]] = {}
    with contextlib.ExitStack() as stack:
        for path, module in of.model.named_modules():

            def output(_module: Any, _args: Any, out: Any, path: str = path) -> None:
                given.setdefault((path, "out"), []).append(kept(out))

            def first(_module: Any, args: Any, kwargs: Any, path: str = path) -> None:
                given.setdefault((path, "in"), []).append(kept(args[0] if args else kwargs.get("hidden_states")))

            stack.callback(module.register_forward_hook(output).remove)
            stack.callback(module.register_forward_pre_hook(first, with_kwargs=True).remove)
        # Twice, so that what has no batch dimension is told from what has.
        out = of.model(**inputs(of, ids.repeat(2, 1)), output_hidden_states=True)
    values: dict[Place, Tensor] = {}
    for (path, side), turns in given.items():
        for number, value in enumerate(turns):
            rows = of_tokens(value, len(ids))
            if rows is not None and path:
                values[Place(path, side, None if len(turns) == 1 else number)] = rows
    names = ("encoder_hidden_states", "decoder_hidden_states") if of.decodes else ("hidden_states",)
    states = [[of_tokens(state, len(ids)) for state in getattr(out, name)] for name in names]
    return Plain(values, states, {path: len(turns) for (path, side), turns in given.items() if side == "out"})


def kept(value: Any) -> Any:
    if isinstance(value, tuple | list):
        value = value[0] if value and isinstance(value[0], Tensor) and value[0].dim() > 2 else None
    return value.clone() if isinstance(value, Tensor) else None


def of_tokens(value: Any, length: int) -> Tensor | None:
    """(T, d) of the first of two equal sequences, None for what is not by sequence and token."""
    if isinstance(value, Tensor) and value.dim() == 2 and len(value) == 2 * length:
        value = value.unflatten(0, (2, length))
    if not isinstance(value, Tensor) or value.dim() < 3 or not value.is_floating_point():
        return None
    if value.shape[:2] == (length, 2):
        value = value.transpose(0, 1)
    # A decoder has read a start token first.
    value = value[:, 1:] if value.shape[:2] == (2, length + 1) else value
    return value[0].flatten(1) if value.shape[:2] == (2, length) else None


def texts() -> tuple[list[str], list[Tensor]]:
    """Documents, and their token ids."""
    generator = torch.Generator().manual_seed(0)
    words = [torch.randint(4, len(tiny_models.WORDS), (length,), generator=generator) for length in LENGTHS]
    tokenizer = tiny_models.tokenizer(special=False)
    documents = [" ".join(tiny_models.WORDS[word] for word in sequence) for sequence in words]
    return documents, [torch.tensor(tokenizer(document)["input_ids"]) for document in documents]


def near(seen: Tensor, wanted: Tensor) -> bool:
    return seen.shape == wanted.shape and bool((seen - wanted).abs().max() <= ROUNDING * wanted.abs().max())


# The checks. Each returns what its cell says.


def harvested(of: Model, places: list[Place], batch_tokens: int) -> list[dict[Place, Tensor]]:
    """Per document of `texts` the rows (T, d) that a harvest gives of each place."""
    config = HarvestConfig(
        hooks=tuple(map(str, places)), ctx_len=32, dtype="float32", heldout=0.0, device="cpu",
        batch_tokens=batch_tokens, keep_special_tokens=True,
    )  # fmt: skip
    documents, ids = texts()
    found: list[dict[Place, Tensor]] = [{} for _ in documents]
    tokenizer = tiny_models.tokenizer(special=False)
    for batch in harvest_batches(config, model=of.model, tokenizer=tokenizer, text=documents):
        for number in batch.seq.unique().tolist():
            rows = batch.seq == number
            assert batch.pos[rows].tolist() == list(range(len(ids[number])))
            found[number] |= {place: batch.rows[str(place)][rows] for place in places}
    return found


def check_places(of: Model, wanted: list[Plain], side: str, batch_tokens: int) -> int:
    """Rows of all places of a side are those of a pass by hand over each document alone."""
    places = [place for place in wanted[0].values if place.side == side]
    for found, by_hand in zip(harvested(of, places, batch_tokens), wanted, strict=True):
        for place in places:
            assert near(found[place], by_hand.values[place]), f"{place} differs from a pass by hand"
    return len(places)


def check_outputs(of: Model, wanted: list[Plain]) -> str:
    for by_hand in wanted:
        for blocks, states in zip(of.blocks, by_hand.states, strict=True):
            # Mamba leaves its embedding out. The last state is often behind a norm that comes after the last block.
            first = 0 if type(of.model).__name__.startswith("Mamba") else 1
            for block, state in zip(blocks[:-1], states[first:], strict=False):
                assert near(by_hand.values[block], state), f"{block} is not the model's own hidden state"
            assert {*blocks} <= {*by_hand.values}
    return str(check_places(of, wanted, "out", batch_tokens=1))


def check_inputs(of: Model, wanted: list[Plain]) -> str:
    return str(check_places(of, wanted, "in", batch_tokens=1))


def check_padding(of: Model, wanted: list[Plain]) -> str:
    padded = sum(LENGTHS) * 2
    assert padded > max(LENGTHS) * len(LENGTHS) - 1
    check_places(of, wanted, "out", batch_tokens=padded)
    return "yes"


def check_company(of: Model, wanted: list[Plain]) -> str:
    """Rows of each block alone are to the bit those that it has beside all other places."""
    everything = list(map(str, wanted[0].values))
    together = run(of, everything)
    for block in of.every:
        assert torch.equal(run(of, [str(block)])[str(block)], together[str(block)]), f"{block} depends on its company"
    return "yes"


def check_chain(of: Model, wanted: list[Plain]) -> str:
    for before, block in ((blocks[n], blocks[n + 1]) for blocks in of.blocks for n in range(len(blocks) - 1)):
        into = str(Place(block.path, "in", block.turn))
        values = run(of, [str(before), into])
        assert torch.equal(values[str(before)], values[into]), f"{into} is not what {before} gives"
    return "yes"


def check_mode(of: Model, wanted: list[Plain]) -> str:
    """A model in train mode, with dropout wherever it has some, gives the rows that it gives in eval mode."""
    blocks = list(map(str, of.every))
    quiet = run(of, blocks)
    before = with_dropout(of.model, 0.3)
    of.model.train()
    try:
        train = run(of, blocks)
        assert all(torch.equal(train[block], quiet[block]) for block in blocks), "dropout was on"
        assert all(module.training for module in of.model.modules()), "the model was left in eval mode"
        dropped = plain(of, texts()[1][0]).values
        noticed = any(not near(dropped[place], wanted[0].values[place]) for place in of.every)
    finally:
        of.model.eval()
        for module, name, value in before:
            setattr(module, name, value)
    return "yes" if noticed else "no dropout"


def with_dropout(model: nn.Module, share: float) -> list[tuple[Any, str, float]]:
    """Sets dropout to a share wherever a module or its config has it in an attribute; what was there before."""
    before = []
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    for holder in (*model.modules(), *{id(config): config for config in configs}.values()):
        for name, value in list(vars(holder).items()):
            named = "dropout" in name or "pdrop" in name or (name == "p" and "Dropout" in type(holder).__name__)
            if named and isinstance(value, float | int) and not isinstance(value, bool):
                before.append((holder, name, value))
                setattr(holder, name, share)
    return before


def run(of: Model, hooks: list[str]) -> dict[str, Tensor]:
    ids = torch.stack([sequence[: LENGTHS[-2]] for sequence in texts()[1][:4]])
    runner = runner_for(of.model, hooks)
    with runner.attached():
        return runner.run(ids, torch.ones_like(ids).bool())


@torch.no_grad()
def check_splice(of: Model, wanted: list[Plain]) -> str:
    """x in place of x changes no bit of what the model puts out, and of a causal model not its loss; 0 does."""
    if type(of.model).__name__.startswith("XLNet"):
        return "–"
    ids = torch.stack([sequence[: LENGTHS[-2]] for sequence in texts()[1][:4]])
    places = splice_places(of, wanted[0])
    if type(of.model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        batches = [TokenBatch(ids, torch.ones_like(ids).bool())]
        for group in [[place] for place in places] + [of.blocks[0]]:
            scores = lm_scores(of.model, group, lambda x: x.clone(), batches)
            assert scores["delta_loss"] == scores["kl_sae"] == 0, f"{group}: x in place of x changes the loss"
        assert scores["kl_zero"] > 0
        return str(len(places))
    whole = inputs(of, ids)
    clean = of.model(**whole)[0]
    for place in places:
        taken = Taken([place])
        with visited(of.model, [place], taken.take):
            of.model(**whole)
        where = torch.ones(taken.value(place).shape[:2], dtype=torch.bool)
        for replace, same in ((torch.clone, True), (torch.zeros_like, False)):
            with spliced(of.model, place, replace, where, taken.calls):
                assert torch.equal(of.model(**whole)[0], clean) == same, f"{place} with {replace.__name__}"
    return str(len(places))


def splice_places(of: Model, by_hand: Plain) -> list[Place]:
    """Blocks on both sides, and the modules right inside the first of a stack."""
    blocks = of.every
    sides = [Place(block.path, side, block.turn) for block in blocks for side in ("out", "in")]  # type: ignore[arg-type]
    heads = [stack[0] for stack in of.blocks]
    inside = [
        place for place in by_hand.values
        if place.side == "out" and place.turn in (None, 0)
        and any(re.fullmatch(rf"{re.escape(block.path)}\.\w+(\.\d+)?", place.path) for block in heads)
    ]  # fmt: skip
    return sides + inside


def check_turns(of: Model, wanted: list[Plain]) -> str:
    """A block that runs once has the turns 0 and -1, which are the same; one that runs n times needs one of n."""
    block = of.blocks[-1][0]
    calls = wanted[0].calls[block.path]
    names = [f"{block.path}@{turn}" for turn in range(calls)]
    values = run(of, names + [f"{block.path}@{turn - calls}" for turn in range(calls)])
    for turn, name in enumerate(names):
        assert torch.equal(values[name], values[f"{block.path}@{turn - calls}"])
    for refused in ([] if calls == 1 else [block.path]) + [f"{block.path}@{calls}", f"{block.path}@{-calls - 1}"]:
        with contextlib.suppress(ValueError):
            run(of, [refused])
            raise AssertionError(f"{refused} is taken")
    if calls == 1:
        assert torch.equal(run(of, [block.path])[block.path], values[names[0]])
    return str(calls)


CHECKS: dict[str, Callable[[Model, list[Plain]], str]] = dict(
    zip(
        COLUMNS,
        (check_outputs, check_inputs, check_padding, check_company, check_chain, check_mode, check_splice, check_turns),
        strict=True,
    )
)


def row(name: str) -> str:
    """A line of the table. Raises AssertionError where a check does not hold."""
    of = built(name)
    wanted = [plain(of, ids) for ids in texts()[1]]
    cells = [check(of, wanted) for check in CHECKS.values()]
    return f"| {SHOWN[name][0]} | `{type(of.model).__name__}` | {' | '.join(cells)} |"


def table(rows: list[str]) -> str:
    head = f"| architecture | class | {' | '.join(COLUMNS)} |"
    return "\n".join([head, "|" + "---|" * (len(COLUMNS) + 2), *rows])


def page(text: str, rows: list[str]) -> str:
    """A page with its table renewed."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m model_matrix", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [row(name) for name in SHOWN]
    sys.stdout.write(table(rows) + "\n")
    if options.write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
