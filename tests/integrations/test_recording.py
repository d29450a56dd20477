"""Codes of a running model on disk: row by row of its tokens, in any number of shards, whatever interrupts them."""

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import served
import tiny_models
import torch
from torch import Tensor

import saefast
from saefast.errors import InputError
from saefast.integrations import recording
from saefast.integrations.recorded import RecordedCodes, Rows
from saefast.models.sae import SAE
from saefast.ops.code import Code

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
IDS = torch.randint(5, 60, (3, 8), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0
MASK[2, 6:] = 0


@cache
def model() -> Any:
    made = tiny_models.model("llama", head=True).double()
    made.generation_config.pad_token_id, made.generation_config.eos_token_id = 0, None
    return made


def saes() -> dict[str, SAE]:
    """Of fixed and of varying width; the second reads a module's input, the third another width."""
    return {
        "layers.0": served.sae("topk", d_in=16),
        "layers.1.self_attn.o_proj:in": served.sae("relu", d_in=16),
        "layers.1.mlp.down_proj:in": served.sae("jumprelu", d_in=32, n_latents=96),
    }


def run(times: int = 1) -> None:
    with torch.no_grad():
        for first in range(times):
            model()(input_ids=(IDS + first) % 60, attention_mask=MASK)


def together(folder: Path) -> Rows:
    """All rows of a folder as one."""
    parts = list(RecordedCodes(folder).shards())
    ids, seq, pos = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "seq", "pos"))
    return Rows(ids, seq, pos, {hook: joined([part.codes[hook] for part in parts]) for hook in parts[0].codes})


def joined(codes: list[Code]) -> Code:
    counts = torch.cat([code.row_ptr.diff() for code in codes if code.row_ptr is not None])
    row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0).int()])
    return Code(torch.cat([code.acts for code in codes]), torch.cat([code.idx for code in codes]), row_ptr.int())


def dense(code: Code, n_latents: int) -> Tensor:
    assert code.row_ptr is not None
    sparse = torch.sparse_csr_tensor(code.row_ptr, code.idx, code.acts, (code.rows, n_latents), check_invariants=True)
    return sparse.to_dense()


@pytest.mark.parametrize("rows_per_shard", [1, 5, 7, 1000])
def test_rows_are_those_of_the_tokens_in_every_hook(tmp_path: Path, rows_per_shard: int) -> None:
    with saefast.encode(model(), saes()) as found:
        run()
    with saefast.record(model(), saes(), tmp_path / "codes", dtype="float64", rows_per_shard=rows_per_shard) as kept:
        run()
        assert kept.rows == 19
    where = MASK.bool()
    codes = RecordedCodes(tmp_path / "codes")
    assert codes.complete
    assert (len(codes), codes.hooks, codes.index["sequences"]) == (19, tuple(saes()), 3)
    assert all(shard["rows"] <= rows_per_shard for shard in codes.index["shards"])
    codes.verify()
    rows = together(tmp_path / "codes")
    assert torch.equal(rows.ids, IDS[where].int())
    assert torch.equal(rows.seq, where.nonzero()[:, 0].int())
    assert torch.equal(rows.pos, (MASK.cumsum(1) - 1)[where].int())
    for hook, sae in saes().items():
        n = sae.config.n_latents
        expected = torch.zeros(3, 8, n, dtype=torch.float64)
        expected.scatter_(-1, found[hook].idx.long(), found[hook].acts.detach())
        # Products of another number of rows may round otherwise.
        torch.testing.assert_close(dense(rows.codes[hook], n), expected[where], rtol=1e-12, atol=1e-13)
    assert {len(batch.ids) for batch in codes.batches(4)} <= {1, 2, 3, 4}
    batched = [dense(batch.codes["layers.0"], served.L) for batch in codes.batches(4)]
    assert torch.equal(torch.cat(batched), dense(rows.codes["layers.0"], served.L))


def test_generate_with_a_cache_goes_on_with_the_sequences_of_the_prompt(tmp_path: Path) -> None:
    """Left padding, one token at a time; the same rows as of one pass over all tokens."""
    mask = MASK.clone()
    mask[2] = 1
    with saefast.record(model(), saes(), tmp_path / "steps", dtype="float64", rows_per_shard=10):
        text = model().generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False)
    whole = torch.cat([mask, torch.ones(3, 4, dtype=torch.int64)], 1)
    with torch.no_grad(), saefast.record(model(), saes(), tmp_path / "whole", dtype="float64"):
        # The last token was never read.
        position_ids = (whole.cumsum(1) - 1).clamp_min(0)
        model()(input_ids=text[:, :-1], attention_mask=whole, position_ids=position_ids)
    found, expected = together(tmp_path / "steps"), together(tmp_path / "whole")
    order = (found.seq.long() * 100 + found.pos).argsort()
    for name in ("ids", "seq", "pos"):
        assert torch.equal(getattr(found, name)[order], getattr(expected, name)), name
    for hook, sae in saes().items():
        ours, theirs = (dense(rows.codes[hook], sae.config.n_latents) for rows in (found, expected))
        torch.testing.assert_close(ours[order], theirs, rtol=1e-5, atol=1e-6)
    assert int(expected.seq.max()) == 2


def test_chosen_tokens_alone_get_rows(tmp_path: Path) -> None:
    skipped = int(IDS[0, 4])
    asked: dict[str, Any] = dict(positions=slice(1, None), skip_ids=[skipped])
    with saefast.record(model(), saes(), tmp_path / "codes", **asked):
        run()
    rows = together(tmp_path / "codes")
    where = (MASK.cumsum(1) - 1 >= 1) & MASK.bool() & (skipped != IDS)
    assert torch.equal(rows.ids, IDS[where].int())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_activations_are_kept_in_a_dtype(tmp_path: Path, dtype: Any) -> None:
    for kind in (dtype, "float64"):
        with saefast.record(model(), saes(), tmp_path / kind, dtype=kind):
            run()
    found, exact = (together(tmp_path / kind).codes["layers.0"] for kind in (dtype, "float64"))
    assert torch.equal(found.acts, exact.acts.to(getattr(torch, dtype)))
    assert torch.equal(found.idx, exact.idx)


def test_memory_is_that_of_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more entries wait than a shard may have, but for a row that has more by itself; nor does a shard."""
    monkeypatch.setattr(recording, "MOST_ENTRIES", 60)
    waited = []
    flush = recording.Recorder._flush

    def watched(self: recording.Recorder) -> None:
        waited.append(self._counts[1])
        flush(self)

    monkeypatch.setattr(recording.Recorder, "_flush", watched)
    with saefast.record(model(), saes(), tmp_path / "codes"):
        run(3)
    shards = RecordedCodes(tmp_path / "codes").index["shards"]
    sizes = [(sum(shard["entries"].values()), shard["rows"]) for shard in shards]
    assert sum(rows for _, rows in sizes) == 3 * 19
    assert all(entries <= 60 or rows == 1 for entries, rows in sizes)
    assert max(waited) <= max(60, max(entries for entries, _ in sizes))
    assert any(rows > 1 for _, rows in sizes), "no shard had several rows, so nothing was tested"


class Stop(KeyboardInterrupt):
    """Ctrl-C at a moment of the test's choosing."""


def is_prefix(rows: Rows, of: Rows) -> None:
    n = len(rows.ids)
    assert torch.equal(rows.ids, of.ids[:n])
    assert torch.equal(rows.seq, of.seq[:n])
    for hook, code in rows.codes.items():
        assert code.row_ptr is not None
        m, theirs = int(code.row_ptr[-1]), of.codes[hook]
        assert theirs.row_ptr is not None
        assert torch.equal(code.row_ptr, theirs.row_ptr[: n + 1])
        assert torch.equal(code.acts, theirs.acts[:m])
        assert torch.equal(code.idx, theirs.idx[:m])


@pytest.mark.parametrize("moment", ["write_file", "write_sealed_json", "after write_sealed_json"])
def test_an_interrupt_at_any_write_leaves_the_same_rows_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    with saefast.record(model(), saes(), tmp_path / "whole", rows_per_shard=8):
        run(2)
    whole = together(tmp_path / "whole")
    name = moment.removeprefix("after ")
    plain, cut = getattr(recording, name), 0
    for number in itertools.count():
        calls, folder = itertools.count(), tmp_path / f"{number}"

        def write(*args: Any, calls: Any = calls, number: int = number, **more: Any) -> Any:
            here = next(calls) == number
            if here and moment == name:
                raise Stop
            written = plain(*args, **more)
            if here:
                raise Stop
            return written

        monkeypatch.setattr(recording, name, write)
        try:
            with saefast.record(model(), saes(), folder, rows_per_shard=8):
                run(2)
        except Stop:
            cut += 1
        else:
            break
        codes = RecordedCodes(folder)
        codes.verify()
        if len(codes):
            is_prefix(together(folder), whole)
        assert not list(folder.rglob("*.tmp"))
        assert len(codes) in (8, 16, 19, 24, 32, 38), "rows of a pass that was read are kept"
    assert cut >= 5


def test_an_error_of_the_model_keeps_the_passes_before_it(tmp_path: Path) -> None:
    with saefast.record(model(), saes(), tmp_path / "whole"):
        run(2)
    lm = model()
    handle = lm.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(_fails_at(3))
    with pytest.raises(ZeroDivisionError), saefast.record(lm, saes(), tmp_path / "codes"):
        run(4)
    handle.remove()
    codes = RecordedCodes(tmp_path / "codes")
    assert (codes.complete, len(codes)) == (False, 38)
    is_prefix(together(tmp_path / "codes"), together(tmp_path / "whole"))


def _fails_at(number: int) -> Any:
    calls = itertools.count(1)

    def hook(_module: Any, _args: Any) -> None:
        if next(calls) == number:
            raise ZeroDivisionError

    return hook


def test_damage_is_one_line(tmp_path: Path) -> None:
    with saefast.record(model(), saes(), tmp_path / "codes", rows_per_shard=8):
        run()
    files = sorted(path for path in (tmp_path / "codes").rglob("*") if path.is_file())
    assert len(files) == 1 + 3 * 4
    for file in files:
        whole = file.read_bytes()
        for at in (3, 60, len(whole) // 2, len(whole) - 2):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(InputError):
                RecordedCodes(tmp_path / "codes").verify()
            file.write_bytes(whole[:at])
            with pytest.raises(InputError):
                RecordedCodes(tmp_path / "codes")
        file.unlink()
        with pytest.raises(InputError):
            RecordedCodes(tmp_path / "codes")
        file.write_bytes(whole)
    # Two whole files in each other's places.
    first, second = (tmp_path / "codes" / "layers.0" / f"0000{number}.safetensors" for number in (0, 1))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    with pytest.raises(InputError, match=r"is not the file that index\.json names"):
        RecordedCodes(tmp_path / "codes")


def test_what_cannot_be_recorded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "theirs").write_text("kept")
    asked: list[tuple[dict[str, Any], str]] = [
        (dict(folder=tmp_path / "full"), "is not empty: codes are recorded into a new folder"),
        (dict(folder=tmp_path / "full" / "theirs"), "cannot be written"),
        (dict(rows_per_shard=0), "rows_per_shard is 0: expected at least 1"),
        (dict(dtype="int8"), "dtype is 'int8'"),
        (dict(saes={}), "saes is a dict: expected an SAE, several, or"),
        (dict(saes=[served.sae("topk")]), "the SAE's metadata has no hook_name"),
        (dict(saes={"layers.1/a": served.sae("topk")}), r"hook 'layers\.1/a' is no module"),
    ]
    for given, message in asked:
        arguments = dict(model=model(), saes=saes(), folder=tmp_path / "new") | given
        with pytest.raises(InputError, match=message), saefast.record(**arguments):
            pass
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["theirs"]
    assert (tmp_path / "full" / "theirs").read_text() == "kept"
    assert not (tmp_path / "new").exists()
    bad = saes()
    with torch.no_grad():
        bad["layers.0"].W_enc[3] = 1e30
    message, large = r"layers\.0 has an activation of more than torch\.float16 holds", tmp_path / "large"
    with pytest.raises(InputError, match=message), saefast.record(model(), bad, large, dtype="float16"):
        run()
    assert not (tmp_path / "large").exists()
    four = MASK[:, None, None, :].expand(3, 1, 8, 8).bool()
    message = r"attention_mask is \(3, 1, 8, 8\): which tokens are padding"
    with pytest.raises(InputError, match=message), torch.no_grad(), saefast.record(model(), saes(), tmp_path / "mask"):
        model()(input_ids=IDS, attention_mask=four)
    with pytest.raises(InputError, match="holds no index"):
        RecordedCodes(tmp_path / "full")


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    import architectures

    lm, sae = architectures.build("bart with a head"), served.sae("topk", d_in=16)
    recorded = saefast.record(lm, sae, tmp_path / "codes", hook="model.encoder.layers.0")
    with pytest.raises(InputError, match="is an encoder with a decoder"), recorded:
        pass
