"""Launch settings: every architecture has them, and autotuning finds and prints the fastest without keeping it."""

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


@pytest.mark.parametrize("arch", [0, 80, 89, 90, 100, 120])
def test_the_kernel_multiplies_two_byte_operands_and_the_library_all_others(arch):
    for D in (64, 768, 1024, 1025, 4096):
        assert tuning.method(arch, "half", D) == "fused"
        assert tuning.method(arch, "ieee", D) == tuning.method(arch, "tf32", D) == ("chunked" if arch else "fused")
        assert tuning.method(arch, "half", D, wide=False) == ("chunked" if arch else "fused")


@pytest.mark.parametrize("width", [2**i for i in range(5, 12)])
@pytest.mark.parametrize("group", [32, 64])
def test_merge_settings_are_powers_of_two_that_launch(width, group):
    config = tuning.merge(width, group)
    assert all(size & (size - 1) == 0 and size > 0 for size in (config.block_g, config.visit, config.warps))
    assert config.warps * 32 * config.registers <= 65536


def test_autotuning_takes_the_fastest_once_and_says_what_to_check_in(capsys):
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
    assert tuning.autotune(key, ["slow", "too large", "quick", "middling"], run, clock) == "quick"
    printed = capsys.readouterr().err
    assert "check in quick" in printed
    assert "too large failed: RuntimeError" in printed
    assert printed.index("quick") < printed.index("middling")
    assert tuning.autotune(key, ["slow"], run, clock) == "quick"
    assert len(ran) == 3
    with pytest.raises(RuntimeError, match="no candidate"):
        tuning.autotune(("op", 90, "another"), ["too large"], run, clock)


def test_autotuning_is_asked_for(monkeypatch):
    monkeypatch.delenv("SAEFAST_AUTOTUNE", raising=False)
    assert not tuning.autotuning()
    monkeypatch.setenv("SAEFAST_AUTOTUNE", "1")
    assert tuning.autotuning()


def test_candidates_begin_with_what_is_checked_in():
    default = tuning.tiles(90, "half", 4096)
    candidates = tuning.tiles_candidates(90, "half", default)
    assert candidates[0] == default
    assert len(set(candidates)) == len(candidates) > 10
    assert tuning.spmm_candidates(tuning.spmm(4096))[0] == tuning.spmm(4096)
    assert tuning.sddmm_candidates(tuning.sddmm(4096, 64))[0] == tuning.sddmm(4096, 64)


@pytest.mark.parametrize("width", [32, 64, 512, 2048])
@pytest.mark.parametrize("group", [32, 64])
def test_candidates_of_the_merge_launch(width, group):
    default = tuning.merge(width, group)
    candidates = tuning.merge_candidates(default, group)
    assert candidates[0] == default
    assert len(set(candidates)) == len(candidates) > 10
    for config in candidates:
        assert all(size & (size - 1) == 0 and size > 0 for size in (config.block_g, config.visit, config.warps))
        assert config.warps * 32 * config.registers <= 65536


@pytest.mark.parametrize(
    ("D", "k", "planes"), [(768, 32, 1), (4096, 64, 1), (768, 128, 2), (17, 3, 1), (4096, 2048, 1)]
)
def test_candidates_of_decode_loss_hold_all_of_k(D, k, planes):
    default = tuning.decode_loss(D, k, planes)
    candidates = tuning.decode_loss_candidates(default)
    assert candidates[0] == default
    assert len(set(candidates)) == len(candidates) >= 4
    assert all(config.block_k == default.block_k >= k for config in candidates)
    assert all(config.block_d & (config.block_d - 1) == 0 and config.block_d >= 8 for config in candidates)


@pytest.mark.parametrize(
    ("D", "whole"), [(768, True), (4096, False), (2304, True), (8192, True), (24, True), (24, False)]
)
def test_candidates_of_row_updates_hold_what_they_must(D, whole):
    default = tuning.rows(D, whole)
    candidates = tuning.rows_candidates(default, whole)
    assert candidates[0] == default
    assert len(set(candidates)) == len(candidates) >= 2
    for config in candidates:
        assert config.block_d & (config.block_d - 1) == 0
        assert 1 <= config.warps <= 16
        assert not whole or config.block_d == default.block_d
