"""The table in docs/attack.md is that of docs/attack.json, and shows an attack at full size without a fault."""

import json

from attack import kill, readers, summary
from attack.outcome import FAULTS
from attack.pool import ROOT

PARTS = json.loads((ROOT / "docs" / "attack.json").read_text(encoding="utf-8"))["parts"]


def test_the_page_shows_the_figures_kept() -> None:
    page = (ROOT / "docs" / "attack.md").read_text(encoding="utf-8")
    assert summary.with_table(page, summary.table(PARTS)) == page


def test_the_figures_are_of_an_attack_at_full_size_and_without_a_fault() -> None:
    assert set(PARTS) == set(summary.ORDER)
    cases = {
        part: sum(sum(counts.values()) for counts in figures["counts"].values()) for part, figures in PARTS.items()
    }
    assert cases["kill"] >= 200
    assert cases["fuzz"] >= 20_000
    assert cases["formats"] >= 10_000
    assert cases["latents"] >= 5_000
    assert cases["arguments"] >= 9_000
    assert {condition.name for condition in kill.CONDITIONS} <= set(PARTS["kill"]["counts"])
    for part in ("fuzz", "formats", "latents"):
        named = {reader.name for reader in readers.available(part) if not reader.needs}
        assert named <= set(PARTS[part]["counts"]), part
    seen = {name for figures in PARTS.values() for counts in figures["counts"].values() for name in counts}
    assert not seen & set(FAULTS)
