"""Launch settings: every architecture has them, and a sweep finds and prints the fastest without keeping it."""

import pytest

from saefast.kernels import tuning


@pytest.mark.parametrize(
    ("capability", "arch"),
    [(None, 0), ((7, 5), 80), ((8, 0), 80), ((8, 6), 89), ((8, 9), 89), ((9, 0), 90), ((10, 3), 100), ((12, 1), 120)],
)
def test_a_capability_has_an_architecture_with_settings(capability, arch):
    assert tuning.architecture(capability) == arch
    for kind in ("half", "tf32", "ieee"):
        for D in (64, 8192):
            assert tuning.tiles(arch, kind, D).block_l % tuning.group(1 << 20) == 0
            assert tuning.pointer_tiles(arch, kind, D).per_sm == 0
    assert tuning.method(arch, 768) in ("fused", "chunked")


@pytest.mark.parametrize("run", [2**i for i in range(5, 12)])
@pytest.mark.parametrize("group", [32, 64])
def test_merge_settings_are_powers_of_two_that_launch(run, group):
    config = tuning.merge(run, group)
    assert all(size & (size - 1) == 0 and size > 0 for size in (config.block_g, config.visit, config.warps))
    assert config.warps * 32 * config.registers <= 65536


def test_a_sweep_takes_the_fastest_once_and_says_what_to_check_in(capsys):
    times = {"slow": 3.0, "quick": 1.0, "middling": 2.0}
    ran = []

    def run(config):
        if config == "too large":
            raise RuntimeError("out of shared memory")
        ran.append(config)

    def clock(launch):
        launch()
        return times[ran[-1]]

    key = ("op", 90, "a shape of this test")
    assert tuning.sweep(key, ["slow", "too large", "quick", "middling"], run, clock) == "quick"
    printed = capsys.readouterr().err
    assert "check in quick" in printed
    assert "too large failed: RuntimeError" in printed
    assert printed.index("quick") < printed.index("middling")
    assert tuning.sweep(key, ["slow"], run, clock) == "quick"
    assert len(ran) == 3
    with pytest.raises(RuntimeError, match="no candidate"):
        tuning.sweep(("op", 90, "another"), ["too large"], run, clock)


def test_sweeping_is_asked_for(monkeypatch):
    monkeypatch.delenv("SAEFAST_AUTOTUNE", raising=False)
    assert not tuning.sweeping()
    monkeypatch.setenv("SAEFAST_AUTOTUNE", "1")
    assert tuning.sweeping()


def test_candidates_begin_with_what_is_checked_in():
    default = tuning.tiles(90, "half", 4096)
    candidates = tuning.tiles_candidates(90, "half", default)
    assert candidates[0] == default
    assert len(set(candidates)) == len(candidates) > 10
    assert tuning.spmm_candidates(tuning.spmm(4096))[0] == tuning.spmm(4096)
    assert tuning.sddmm_candidates(tuning.sddmm(4096, 64))[0] == tuning.sddmm(4096, 64)
