"""Tokens per second of a harvest to disk, against the language model's own forward pass over the same batches.

    python -m bench.harvest [--device cpu|cuda] [--models minilm causal] [--compile] [--out DIR] [--quick] [--no-check]

Contenders, in turn, over the same token ids and masks, in the same dtype and with the same threads:
    harvest         `harvest` into an empty folder: reads, tokenises, runs, picks rows, shuffles, digests, writes, syncs
    whole pass      the model as transformers runs it, batch after batch
    cut pass        the same, ended after the module that is harvested
    side by side    the cut pass on the threads that a harvest runs batches on, and nothing else
The batches are recorded from a harvest, so they are exactly those; a pass keeps nothing of what it computes.
--compile adds the cut pass of the model under torch.compile.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bench import common
from saefast.errors import InputError
from saefast.harvest.config import HarvestConfig
from saefast.harvest.harvester import Harvester
from saefast.harvest.language_models import DEFAULT_MODEL, SMALL_LANGUAGE_MODEL
from saefast.harvest.text import open_text
from saefast.harvest.to_disk import harvest
from saefast.harvest.workers import in_order

# A harvest is to reach this share of the cut pass.
ASKED = 0.9
# Rounds of all contenders: in full, with --quick, in a rehearsal.
ROUNDS = (3, 2, 1)

Batch = dict[str, Any]


class Case(NamedTuple):
    """A model, the module that is harvested, tokens a pass, and characters read: in full, with --quick, rehearsed."""

    model: str
    hook: str
    batch_tokens: int
    chars: tuple[int, int, int]


# Passes of few tokens, so that there are many: the beginning and the end of a harvest, when not all threads have work,
# matter less, as in long ones.
CASES = {
    "minilm": Case(DEFAULT_MODEL, "layers.4", 2048, (250_000, 60_000, 2_000)),
    "causal": Case(SMALL_LANGUAGE_MODEL, "layers.15", 512, (30_000, 8_000, 500)),
}


class _Ended(Exception):
    """The pass has come to the module that is harvested."""


def loaded(case: Case, config: HarvestConfig) -> tuple[str, Any, Any]:
    """What the model is called, the model, in the dtype that a harvest chooses, and its tokenizer."""
    try:
        made = Harvester(config)
        return case.model, made.model, made.tokenizer
    except InputError as missing:
        print(f"{missing}: a Llama of SmolLM2-135M's sizes with random weights instead")
    other = Harvester(HarvestConfig(device=config.device))
    dtype = next(other.model.parameters()).dtype
    return "a random Llama of 135M parameters", random_llama(dtype, config.device), other.tokenizer


def random_llama(dtype: torch.dtype, device: str) -> Any:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaModel(config).to(device, dtype).eval()


def documents(chars: int) -> list[str]:
    """Docstrings of the standard library. A text that max_tokens cuts would not do: all of a window is tokenised."""
    found: list[str] = []
    for document in open_text(None):
        found.append(str(document))
        chars -= len(document)
        if chars <= 0:
            break
    return found


def harvested(config: HarvestConfig, text: list[str], model: Any, tokenizer: Any) -> int:
    """Harvests into a folder that is deleted; tokens run through the model."""
    with tempfile.TemporaryDirectory() as folder:
        report = harvest(Path(folder) / "acts", config, model=model, tokenizer=tokenizer, text=text, progress=False)
    return report.tokens


def recorded(config: HarvestConfig, text: list[str], model: nn.Module, tokenizer: Any) -> list[Batch]:
    """The arguments of every forward pass of a harvest, which runs them in threads of its own."""
    batches: list[Batch] = []

    def record(_: nn.Module, __: Any, given: Batch) -> None:
        batches.append(dict(given))

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        tokens = harvested(config, text, model, tokenizer)
    finally:
        handle.remove()
    # A harvest may begin with a pass that only looks at how the model runs.
    return batches[1:] if tokens_in(batches) > tokens else batches


def tokens_in(batches: Sequence[Batch]) -> int:
    """Without padding."""
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
    return sum(int(mask.sum()) for mask in masks)


@contextmanager
def ended_at(module: nn.Module) -> Iterator[None]:
    """Within it, a forward pass ends where the module has run."""

    def end(*_: Any) -> None:
        raise _Ended

    handle = module.register_forward_hook(end)
    try:
        yield
    finally:
        handle.remove()


def run_batch(model: nn.Module, batch: Batch) -> None:
    with torch.inference_mode(), suppress(_Ended):
        model(**batch)


def passes(model: nn.Module, batches: Sequence[Batch], device: str, end: nn.Module | None, workers: int = 1) -> None:
    if end is None:
        for batch in batches:
            run_batch(model, batch)
    else:
        with ended_at(end):
            for _ in in_order(partial(run_batch, model), iter(batches), workers):
                pass
    common.synchronize(device)


def contenders(
    case: Case, config: HarvestConfig, text: list[str], compiled: bool
) -> tuple[dict[str, Any], dict[str, common.Call]]:
    """What is compared, and how each is called."""
    label, model, tokenizer = loaded(case, config)
    batches = recorded(config, text, model, tokenizer)
    runner = Harvester(config, model=model, tokenizer=tokenizer).runner
    end, device = model.get_submodule(runner.hooks[0]["hf_name"]), config.device
    calls: dict[str, common.Call] = {
        "harvest": partial(harvested, config, text, model, tokenizer),
        "whole pass": partial(passes, model, batches, device, None),
        "cut pass": partial(passes, model, batches, device, end),
    }
    if runner.workers > 1:
        calls["side by side"] = partial(passes, model, batches, device, end, runner.workers)
    if compiled:
        calls["cut pass, compiled"] = partial(passes, torch.compile(model, dynamic=True), batches, device, end)
    tokens = tokens_in(batches)
    facts = {"model": label, "hook": case.hook, "dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    facts |= {"tokens": tokens, "batches": len(batches), "workers": runner.workers}
    return facts | {"padding": 1 - tokens / sum(batch["input_ids"].numel() for batch in batches)}, calls


def line(what: str, taken: common.Spread, tokens: int, taken_by_cut: common.Spread) -> dict[str, Any]:
    rate = {"tokens/s": tokens / taken.median, "low": tokens / taken.p80, "high": tokens / taken.p20}
    return {"what": what} | rate | {"of the cut pass": taken_by_cut.median / taken.median, "seconds": list(taken)}


def measured(case: Case, device: str, size: int, compiled: bool) -> dict[str, Any]:
    config = HarvestConfig(model=case.model, hooks=(case.hook,), batch_tokens=case.batch_tokens, device=device)
    facts, calls = contenders(case, config, documents(case.chars[size]), compiled)
    taken = common.interleaved(calls, ROUNDS[size])
    lines = [line(what, spread, facts["tokens"], taken["cut pass"]) for what, spread in taken.items()]
    common.print_table(facts)
    common.print_timed(lines)
    return facts | {"asked": ASKED, "contenders": lines}


def main(argv: Sequence[str] | None = None) -> None:
    options = common.arguments(
        "bench.harvest", __doc__, argv,
        models=dict(nargs="+", choices=list(CASES), default=list(CASES)), compile=dict(action="store_true"),
    )  # fmt: skip
    if not options.no_check:
        common.check(options.device, "harvest/test_parallel.py")
    size = 2 if options.rehearse else 1 if options.quick else 0
    results = []
    for name in options.models:
        found = common.attempt(name, partial(measured, CASES[name], options.device, size, options.compile))
        if found is not None:
            results.append(found)
            common.write_results(options.out, options.device, "harvest", results)


if __name__ == "__main__":
    main()
