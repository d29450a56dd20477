"""load and save: the same SAE comes back whatever it lay in, weights are in memory once, and bad files are named."""

import json
import os
import shutil
import weakref

import pytest
import torch
from allocations import Allocations
from safetensors.torch import load_file, save_file

import saefast
from saefast.data import shardfile
from saefast.errors import InputError
from saefast.formats import archives, format, formats, load, save
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

D, L = 12, 40


def make(**changes):
    sae = SAE(SAEConfig(**dict(d_in=D, n_latents=L, k=4) | changes), seed=0)
    with torch.no_grad():
        for number, parameter in enumerate(sae.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return sae


def same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.fixture
def own(tmp_path):
    make(metadata={"hook_name": "h"}).save(tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def theirs(tmp_path):
    assert saefast.save(make(), tmp_path / "theirs", "saelens") == []
    return tmp_path / "theirs"


def test_our_own_files_are_loaded_as_ever(own):
    for path in (own, own / "sae.safetensors", str(own)):
        sae = saefast.load(path)
        assert same(sae, make())
        assert sae.config == make(metadata={"hook_name": "h"}).config
        assert all(parameter.requires_grad for parameter in sae.parameters())
    shutil.copy(own / "sae.safetensors", own.parent / "whatever")
    assert same(load(own.parent / "whatever"), make())


def test_a_file_is_read_with_the_config_beside_it(theirs):
    save(make(k=5), theirs.parent / "other", "saelens")
    assert same(load(theirs / "sae_weights.safetensors"), load(theirs))
    (theirs / "cfg.json").unlink()
    with pytest.raises(InputError, match=r"of no format that is known; it holds sae_weights\.safetensors"):
        load(theirs / "sae_weights.safetensors")


def test_what_happens_to_a_file_later_does_not_change_an_sae(own):
    sae, mapped = load(own), load(own, map=True)
    with (own / "sae.safetensors").open("r+b") as file:
        file.seek(-600, os.SEEK_END)
        file.write(bytes(600))
    assert same(sae, make())
    assert not same(mapped, make())


def test_a_digest_is_compared_unless_nobody_asked(own):
    data = bytearray((own / "sae.safetensors").read_bytes())
    data[-1] ^= 1
    (own / "sae.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="digest"):
        load(own)
    assert not same(load(own, verify=False), make())


@pytest.mark.parametrize("kind", ["own", "theirs"])
@pytest.mark.parametrize("dtype", ["float64", torch.bfloat16, None])
def test_weights_in_another_dtype(kind, dtype, own, theirs):
    sae = load({"own": own, "theirs": theirs}[kind], dtype=dtype)
    wanted = {"float64": torch.float64, None: torch.float32}.get(dtype, dtype)
    assert {parameter.dtype for parameter in sae.parameters()} == {wanted}
    assert sae.config.dtype == str(wanted).removeprefix("torch.")
    assert torch.equal(sae.W_dec, make().W_dec.to(wanted))


def test_thresholds_of_few_bits_stay_what_they_were(tmp_path):
    sae = make(activation="jumprelu", dtype="bfloat16")
    save(sae, tmp_path / "a", "saelens")
    threshold = load_file(tmp_path / "a" / "sae_weights.safetensors")["threshold"]
    assert threshold.dtype == torch.bfloat16
    again = load(tmp_path / "a")
    assert again.dtype == torch.float32
    torch.testing.assert_close(again.log_threshold.exp(), threshold.float(), rtol=1e-6, atol=0)
    assert load(tmp_path / "a", dtype="bfloat16").dtype == torch.bfloat16


# --- memory


class Memory(Allocations):
    """What tensors take that have memory at all."""

    def note(self, storage):
        if storage.device.type != "meta":
            super().note(storage)

    def leave_out(self, tensor):
        """A tensor that was there before, or is of a mapped file."""
        storage = tensor.untyped_storage()
        self.known.add(storage._cdata)
        weakref.finalize(storage, self.known.discard, storage._cdata)
        return tensor


@pytest.fixture
def watch(monkeypatch):
    """Counts memory that is taken: mapped files are none. A piece is 4 KiB here."""
    monkeypatch.setattr(format, "PIECE_BYTES", 1 << 12)
    monkeypatch.setattr(shardfile, "_PIECE_BYTES", 1 << 12)
    counter = Memory()
    real = shardfile.map_bytes

    for module in (shardfile, archives):
        monkeypatch.setattr(module, "map_bytes", lambda *args: counter.leave_out(real(*args)))
    return counter


@pytest.mark.parametrize("name", ["saefast", "saelens"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_in_memory_once(name, dtype, watch, tmp_path):
    big = make(d_in=64, n_latents=4096)
    save(big, tmp_path / "a", name)
    with watch:
        sae = load(tmp_path / "a", dtype=dtype)
    held = sum(parameter.nbytes for parameter in sae.parameters())
    assert held >= 64 * 4096 * 2 * sae.dtype.itemsize
    # The b_enc that is checked to be finite is a piece of its own size.
    assert held <= watch.peak < held + 5 * (1 << 12) + 4 * 4096


@pytest.mark.parametrize("name", ["saefast", "saelens"])
def test_saving_takes_no_memory(name, watch, tmp_path):
    big = make(d_in=64, n_latents=4096, activation="batchtopk", rescale_acts_by_decoder_norm=True)
    big.threshold.fill_(0.5)
    for tensor in big.state_dict().values():
        watch.leave_out(tensor)
    with watch:
        save(big, tmp_path / "a", name)
    # Norms of the decoder's rows, some times.
    assert watch.peak < 64 * 4096 * 4 / 8


def test_a_mapped_file_takes_no_memory_and_nothing_written_reaches_it(watch, tmp_path):
    big = make(d_in=64, n_latents=4096)
    big.save(tmp_path)
    with watch:
        sae = load(tmp_path, map=True)
    assert watch.peak < 64 * 4096
    before = (tmp_path / "sae.safetensors").read_bytes()
    x = torch.randn(3, 64)
    assert torch.equal(sae.encode(x), big.encode(x))
    with torch.no_grad():
        sae.W_enc.add_(1)
        sae.W_dec.zero_()
    assert (tmp_path / "sae.safetensors").read_bytes() == before
    assert same(load(tmp_path), big)


def sparse_file(file, n_latents, d_in):
    """A file of ours that is all holes: zeros that take no room on the disk. -> where each tensor begins."""
    config = SAEConfig(d_in=d_in, n_latents=n_latents, k=4)
    header, end = {"__metadata__": {"format": "saefast", "config": json.dumps(config.to_dict())}}, 0
    for name, shape in config.architecture().shapes().items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text = text.ljust(len(text) + -(len(text) + 8) % 4096)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + header[name]["data_offsets"][0] for name in config.architecture().shapes()}


def anonymous():
    """Bytes of memory of this process that no file stands behind."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024


def test_sixteen_million_latents_are_mapped_and_encode_takes_no_second_copy(watch, tmp_path):
    n, d = 1 << 24, 8
    starts = sparse_file(tmp_path / "big.safetensors", n, d)
    with (tmp_path / "big.safetensors").open("r+b") as file:
        for latent, value in ((n - 1, 1.0), (12_345_678, 2.0)):
            file.seek(starts["W_enc"] + 4 * d * latent)
            file.write(torch.full((d,), value).numpy().tobytes())
    before = anonymous()
    sae = load(tmp_path / "big.safetensors", map=True, verify=False).requires_grad_(False)
    with watch:
        acts, idx = sae.encode_sparse(torch.ones(1, d))
        x_hat = sae.decode_sparse(acts, idx)
    assert idx[0, :2].tolist() == [12_345_678, n - 1]
    assert acts[0].tolist() == [16.0, 8.0, 0.0, 0.0]
    assert x_hat.shape == (1, d)
    # b_enc is read, 4 bytes a latent, and an encoder's scratch has as much at most; W_enc would be 32 bytes a latent.
    assert watch.peak < 8 * n
    assert anonymous() - before < 16 * n


def test_a_file_larger_than_memory_is_mapped(tmp_path):
    n = 1 << 20
    d = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (4 * n) + 1
    try:
        sparse_file(tmp_path / "big.safetensors", n, d)
    except OSError as error:
        pytest.skip(f"no room for a sparse file: {error}")
    sae = load(tmp_path / "big.safetensors", map=True, verify=False)
    assert sae.W_enc.shape == (n, d)
    assert float(sae.W_dec[-1, -1].detach()) == 0
    with pytest.raises(InputError, match="needs at least"):
        load(tmp_path / "big.safetensors", verify=False)


@pytest.mark.parametrize(
    ("options", "why"),
    [(dict(device="cuda"), "device is"), (dict(dtype="bfloat16"), "float32 in"), (dict(format="saelens"), "in a row")],
)
def test_what_cannot_be_mapped_says_so(options, why, own, theirs):
    if options.get("device") == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs another device")
    with pytest.raises(InputError, match=f"map is True, but .*{why}.*saefast convert"):
        load(theirs if "format" in options else own, map=True, **options)


# --- bad files


def changed(folder, **tensors):
    """SAELens' file with some tensors changed, or without those that are None."""
    file = folder / "sae_weights.safetensors"
    values = load_file(file)
    for name, change in tensors.items():
        value = values.pop(name)
        if change is not None:
            values[name] = change(value).contiguous()
    save_file(values, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(W_dec=None), r"lacks the tensor 'W_dec' of shape \(40, 12\); it holds W_enc \(12, 40\)"),
        (dict(b_enc=None), r"lacks the tensor 'b_enc' of shape \(40,\)"),
        (dict(W_enc=lambda t: t.T), r"W_enc has shape \(40, 12\): it is transposed, expected \(12, 40\)"),
        (dict(W_dec=lambda t: t.T), r"W_dec has shape \(12, 40\): it is transposed, expected \(40, 12\)"),
        (dict(W_dec=lambda t: t[:, :5]), r"W_dec has shape \(40, 5\), expected \(40, 12\)"),
        (dict(b_enc=lambda t: t[:39]), r"b_enc has shape \(39,\), expected \(40,\)"),
        (dict(W_enc=lambda t: t.long()), r"W_enc is of torch.int64: expected weights in one of"),
        (dict(W_enc=lambda t: t.masked_fill(t == t[3, 7], torch.nan)), r"W_enc is not finite .* in row 7"),
        (dict(W_dec=lambda t: t.masked_fill(t == t[3, 7], torch.inf)), r"W_dec is not finite .* in row 3"),
        (dict(b_dec=lambda t: t.masked_fill(t == t[3], -torch.inf)), r"b_dec is not finite .* in row 3"),
    ],
)
def test_tensors_that_are_not_as_they_should_be(change, message, theirs):
    changed(theirs, **change)
    with pytest.raises(InputError, match=message) as caught:
        load(theirs)
    assert len(str(caught.value).splitlines()) == 1
    assert str(theirs) in str(caught.value)


def test_numbers_too_large_for_the_dtype_that_is_asked_for(theirs):
    changed(theirs, W_enc=lambda t: t * 1e6)
    load(theirs)
    with pytest.raises(InputError, match=r"W_enc is not finite \(NaN or inf\) in row \d+, as torch.float16"):
        load(theirs, dtype="float16")


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(d_sae=2**31 - 1), r"expected \(12, 2147483647\)"),
        (dict(d_sae=2**40), "less than 2"),
        (dict(d_in=-3), "at least 1"),
        (dict(d_sae="many"), "n_latents is 'many'"),
        (dict(k=10**9), "k is 1000000000"),
        (dict(k=float("nan")), "k is nan"),
    ],
)
def test_sizes_that_a_config_alone_claims(cfg, message, theirs, watch):
    values = json.loads((theirs / "cfg.json").read_text())
    (theirs / "cfg.json").write_text(json.dumps(values | cfg))
    with watch, pytest.raises(InputError, match=message):
        load(theirs)
    assert watch.peak < 1 << 16


def test_an_unknown_layout_is_described_and_the_nearest_format_named(tmp_path, theirs):
    shutil.rmtree(theirs)
    with pytest.raises(InputError, match="holds no files"):
        load(tmp_path)
    save_file({"W_enc": torch.ones(2, 3), "what": torch.ones(1)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(
        InputError, match=r"of no format that is known; it holds sae_weights\.safetensors, .*what.*\."
    ) as e:
        load(tmp_path)
    assert "The nearest is saelens, which needs cfg.json" in str(e.value)
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(InputError, match="is of no format that is known"):
        load(tmp_path / "readme.txt")


def test_a_folder_of_two_formats(own, theirs):
    for file in theirs.iterdir():
        shutil.copy(file, own)
    with pytest.raises(InputError, match="holds files of saefast and of saelens: say which"):
        load(own)
    assert load(own, format="saelens").config.metadata["format"] == "saelens"
    assert same(load(own, format="saefast"), load(own / "sae.safetensors"))


def test_a_folder_that_has_saes_in_it(tmp_path):
    for name in ("layer_0", "layer_1"):
        save(make(), tmp_path / name, "saelens")
    with pytest.raises(InputError, match="is no SAE but holds some: name one of layer_0, layer_1"):
        load(tmp_path)


def test_another_format_than_the_file_has(own, theirs):
    with pytest.raises(InputError, match=r"cfg\.json does not exist"):
        load(own, format="saelens")
    with pytest.raises(InputError, match=r"sae\.safetensors does not exist"):
        load(theirs, format="saefast")
    for call in (lambda: load(own, format="saelenz"), lambda: save(make(), own, "saelenz")):
        with pytest.raises(InputError, match="format is 'saelenz', which there is not: perhaps saelens"):
            call()
    for dtype in ("int8", torch.int8, "float"):
        with pytest.raises(InputError, match="dtype is"):
            load(own, dtype=dtype)


# --- writing


def test_nothing_that_is_there_is_written_over(own, tmp_path):
    with pytest.raises(InputError, match="holds other files"):
        save(make(), own, "saelens")
    save(make(), tmp_path / "a" / "b", "saelens")
    save(make(k=5), tmp_path / "a" / "b", "saelens")
    assert load(tmp_path / "a" / "b").config.k == 5
    with pytest.raises(InputError, match="cannot write"):
        save(make(), own / "config.json" / "x", "saelens")


def test_an_sae_on_the_meta_device_has_nothing_to_save(tmp_path):
    with pytest.raises(InputError, match="meta device"):
        save(make().to("meta"), tmp_path / "a", "saelens")
    assert not (tmp_path / "a").exists()


def test_how_often_latents_fire_goes_along(tmp_path):
    shares = torch.rand(L)
    assert save(make(), tmp_path / "a", "saelens", density=shares) == []
    found = load_file(tmp_path / "a" / "sparsity.safetensors")["sparsity"]
    torch.testing.assert_close(10**found - 1e-10, shares)
    lost = save(make(), tmp_path / "b", density=shares)
    assert lost == ["how often latents fire is left out: saefast has no place for it"]
    for odd, message in ((shares[1:], "has shape"), (shares - 1, "no shares"), (shares * torch.nan, "no shares")):
        with pytest.raises(InputError, match=f"density .*{message}"):
            save(make(), tmp_path / "c", "saelens", density=odd)


@pytest.mark.parametrize("one", formats.values(), ids=lambda one: one.name)
def test_every_format_says_what_it_is(one):
    assert formats[one.name] is one
    assert one.about
    assert one.layout
    assert one.signs
