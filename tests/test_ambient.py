"""The modes that surround a call change nothing in it, and the caller's code keeps its own."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saefast import ambient, extension
from saefast.analysis.evaluation import evaluate, evaluate_run
from saefast.engines.autograd import AutogradEngine
from saefast.engines.config import TrainConfig
from saefast.engines.fused import FusedEngine
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, load
from saefast.training.api import train
from saefast.training.several import Member, train_many

CONFIG = SAEConfig(d_in=24, n_latents=64, k=4)
COMMON: dict[str, Any] = dict(
    batch_size=64, device="cpu", dead_after=200, auxk_k=4, eval_every=8, save_every=8, log_every=8
)
KINDS: dict[str, dict[str, Any]] = {
    "fused": dict(multi_topk_coef=0.1, max_grad_norm=1.0),
    "lean": dict(optimizer="adam-lean"),
    "autograd": dict(engine="autograd", loss="scaled_mse", init_encoder_scale=True),
}


def rows(n: int = 1200) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    made = torch.rand(n, 40, generator=generator, dtype=torch.float32, device="cpu") ** 6
    return made @ torch.randn(40, 24, generator=generator, dtype=torch.float32, device="cpu") + 1


ROWS = rows()


@contextlib.contextmanager
def everything() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, mode in MODES.items():
            if name != "everything at once":
                stack.enter_context(mode())
        yield


@contextlib.contextmanager
def setting(change: Callable[[Any], Any], value: Any, back: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(back)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "set_grad_enabled": lambda: setting(torch.set_grad_enabled, False, True),
    "inference_mode": torch.inference_mode,
    "default dtype bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default dtype float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "matmul precision": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "bf16 products": lambda: setting(set_mkldnn, "bf16", "none"),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "everything at once": everything,
}


def set_mkldnn(precision: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = precision


def weights(sae: SAE) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in sae.parameters()]


def smoke(folder: Path) -> list[Tensor]:
    """Trains with each engine, loads, evaluates and uses; every number that came of it."""
    found = []
    for name, changes in KINDS.items():
        config = TrainConfig(**COMMON | changes)
        sae = train(ROWS, CONFIG, config, folder / name)
        read = load(folder / name)
        metrics = evaluate_run(folder / name, ROWS).metrics
        found += [*weights(sae), *weights(read), torch.tensor([*metrics.values()], dtype=torch.float64, device="cpu")]
        found += used(read)
        for p in (*sae.parameters(), *read.parameters()):
            assert p.requires_grad
            assert not p.is_inference()
    members = {
        name: Member(list(ROWS.split(100)), CONFIG, TrainConfig(**COMMON, n_tokens=1024, seed=i))
        for i, name in enumerate("ab")
    }
    for sae in train_many(members).values():
        found += weights(sae)
    return found


def used(sae: SAE) -> list[Tensor]:
    """What the methods of an SAE give."""
    acts, idx = sae.encode_sparse(ROWS[:50])
    dense = sae.encode(ROWS[:50])
    found = [acts, idx, dense, sae.decode_sparse(acts, idx), sae.decode(dense), *sae(ROWS[:50])]
    return [t.detach().clone() for t in found]


def in_a_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(call).result()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[Tensor]]:
    """With the extension and without it."""
    found = {True: smoke(tmp_path_factory.mktemp("plain"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "load", lambda: None)
        found[False] = smoke(tmp_path_factory.mktemp("torch"))
    return found


@pytest.mark.parametrize("built", [True, False], ids=["C++", "torch"])
@pytest.mark.parametrize("mode", [*MODES, "thread"])
def test_the_same_bits_under_every_mode(
    mode: str,
    built: bool,
    undisturbed: dict[bool, list[Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if built and not extension.available():
        pytest.skip("needs the C++ extension")
    if not built:
        monkeypatch.setattr(extension, "load", lambda: None)
    if mode == "thread":
        found = in_a_thread(lambda: smoke(tmp_path))
    else:
        with MODES[mode]():
            found = smoke(tmp_path)
    wrong = [i for i, (a, b) in enumerate(zip(undisturbed[built], found, strict=True)) if not torch.equal(a, b)]
    assert not wrong, f"{len(wrong)} of {len(found)} results differ, the first is number {wrong[0]}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", [FusedEngine, AutogradEngine])
def test_an_engine_alone_is_the_same_too(mode: str, engine: type[FusedEngine | AutogradEngine]) -> None:
    def steps() -> list[Tensor]:
        sae = SAE(CONFIG, seed=0)
        made = engine(sae, TrainConfig(), 3)
        made.initialise(ROWS[:100])
        for x in ROWS[:192].split(64):
            made.step(x)
        made.finish()
        return weights(sae)

    expected = steps()
    with MODES[mode]():
        found = steps()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("mode", ["autocast", "matmul precision", "bf16 products"])
def test_a_product_is_as_outside_of_the_mode(mode: str) -> None:
    """At a size where torch takes its fast products: the tests above say nothing where a mode changes nothing."""
    sae = SAE(SAEConfig(256, 1024, 8), seed=0)
    f = sae.encode(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)))
    expected, bare = sae.decode(f), f @ sae.W_dec
    with MODES[mode]():
        assert torch.equal(sae.decode(f), expected)
        with ambient.plain():
            assert torch.equal(f @ sae.W_dec, bare)
        has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        if mode == "autocast" or has_bf16:
            assert not torch.equal((f @ sae.W_dec).float(), bare)


class Spy:
    """Batches of rows, and the modes that each was drawn in."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool, bool, str]] = []
        self.told: list[tuple[bool, bool, bool, str]] = []

    def look(self, told: bool = False) -> None:
        (self.told if told else self.seen).append(
            (
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.get_float32_matmul_precision(),
            )
        )

    def __iter__(self) -> Iterator[Tensor]:
        for part in ROWS.split(64):
            self.look()
            yield part * 1


@pytest.mark.parametrize("use", ["train", "evaluate"])
def test_data_is_drawn_and_logs_are_told_in_the_modes_of_the_caller(use: str) -> None:
    spy = Spy()
    with torch.autocast("cpu"), torch.inference_mode(), MODES["matmul precision"]():
        if use == "train":
            config = TrainConfig(**COMMON, n_tokens=1024, engine="autograd")
            sae = train(spy, CONFIG, config, on_log=lambda line: spy.look(told=True))
            assert not sae.W_enc.is_inference()
        else:
            evaluate(SAE(CONFIG), spy)
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled()
        assert torch.get_float32_matmul_precision() == "medium"
    assert len(spy.seen) > 10
    # Beside training rows are drawn at full precision: that is one setting for all threads.
    assert set(spy.seen) == {(False, True, True, "medium" if use == "evaluate" else "highest")}
    assert {modes[:3] for modes in spy.told} == ({(False, True, True)} if use == "train" else set())


def test_a_mode_that_a_generator_yields_in_stays_its_own() -> None:
    spies = {"loud": Spy(), "quiet": Spy()}

    def quietly() -> Iterator[Tensor]:
        with torch.no_grad(), torch.autocast("cpu"):
            yield from spies["quiet"]

    config = TrainConfig(**COMMON, n_tokens=1024, engine="autograd")
    members = {"loud": Member(spies["loud"], CONFIG, config), "quiet": Member(quietly(), CONFIG, config)}
    found = train_many(members)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert set(spies["loud"].seen) == {(True, False, False, "highest")}
    assert set(spies["quiet"].seen) == {(False, False, True, "highest")}
    alone = train(Spy(), CONFIG, config)
    assert all(torch.equal(a, b) for a, b in zip(weights(alone), weights(found["loud"]), strict=True))


def test_gradients_are_the_callers_business() -> None:
    sae = SAE(CONFIG, seed=0)
    assert sae(ROWS[:5]).x_hat.requires_grad
    with torch.no_grad():
        assert not sae(ROWS[:5]).x_hat.requires_grad
        with torch.enable_grad():
            assert sae.decode(sae.encode(ROWS[:5])).requires_grad
    with torch.inference_mode():
        assert sae(ROWS[:5]).x_hat.is_inference()
    with torch.autocast("cpu"):
        sae(ROWS[:5]).x_hat.sum().backward()
    expected = torch.autograd.grad(sae(ROWS[:5]).x_hat.sum(), list(sae.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(sae.parameters(), expected, strict=True) if p.grad is not None)


def test_precision_comes_back_when_the_last_thread_is_done() -> None:
    """Two blocks that overlap: the first to end must not take the second one's precision, nor leave it behind."""
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with ambient.plain():
            first_in.set()
            second_in.wait(60)
        first_out.set()

    with MODES["matmul precision"]():
        thread = threading.Thread(target=first)
        thread.start()
        first_in.wait(60)
        with ambient.plain():
            second_in.set()
            first_out.wait(60)
            assert torch.get_float32_matmul_precision() == "highest"
        thread.join()
        assert torch.get_float32_matmul_precision() == "medium"


def test_modes_are_back_after_an_error() -> None:
    with torch.autocast("cpu"), torch.no_grad(), MODES["bf16 products"]():
        with pytest.raises(RuntimeError, match="on purpose"):
            train(fails_after(3), CONFIG, TrainConfig(**COMMON, n_tokens=1024))
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.get_float32_matmul_precision() == "highest"


def fails_after(n: int) -> Iterator[Tensor]:
    yield from ROWS.split(64)[:n]
    raise RuntimeError("on purpose")
