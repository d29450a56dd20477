"""A sample of the experiments: what is taken out of a kernel is noticed, or was not needed.

`make ptx` takes out everything, one at a time; its counts stand in docs/ptx.md.
"""

from collections import Counter

import pytest
import torch

from ptx.mutate import Tally, removable, subjects, tried
from ptx.parse import parse

SAMPLE = 4


@pytest.fixture(scope="module")
def tallies() -> dict[str, Tally]:
    torch.manual_seed(0)
    return {s.kernel: tried(s, SAMPLE) for s in subjects(90, ("lean",), ("fused",))}


def test_nothing_that_changes_a_result_is_missed(tallies: dict[str, Tally]) -> None:
    assert tallies.keys() >= {"tiles_descriptor", "tiles_pointer", "merge_topk", "decode_loss", "lean_row_update"}
    assert "decode_loss_csr" in tallies
    missed = {kernel: tally.found for kernel, tally in tallies.items() if tally.of("missed")}
    assert not missed


def test_most_of_it_is_noticed(tallies: dict[str, Tally]) -> None:
    """All of it, but for barriers that these inputs do not need: an eighth in docs/ptx.md, most before a TMA copy."""
    found: Counter[tuple[str, str]] = sum((tally.found for tally in tallies.values()), Counter())
    assert {kind for kind, verdict in found if verdict == "redundant"} <= {"bar.sync"}
    caught = sum(n for (_, verdict), n in found.items() if verdict == "caught")
    assert found.total() >= 25
    assert caught >= 0.7 * found.total(), found


def test_what_can_be_taken_out() -> None:
    program = parse(
        ".visible .entry k(.param .u64 p)\n{\nbar.sync 0;\nbar.warp.sync -1;\ncp.async.wait_group 1;\n"
        "wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%r1], 0;\n@!done bra wait;\nret;\n}\n"
    )
    assert dict(removable(program)) == {"bar.sync": (0,), "cp.async.wait_group": (2,), "mbarrier.try_wait": (3, 4)}
