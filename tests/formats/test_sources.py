"""Source: what is in files is known before any of it is read, sizes are those of the files, and no pickle runs."""

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saefast.errors import InputError
from saefast.formats import Entry, Source


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "W": torch.randn(5, 3, generator=generator),
        "b": torch.randn(5, generator=generator, dtype=torch.float64),
        "n": torch.arange(4),
        "k": torch.tensor(7),
    }


def write(kind, folder):
    values = tensors()
    if kind == "safetensors":
        save_file(values, folder / "x.safetensors", {"format": "pt"})
        return "x.safetensors"
    if kind in ("npz", "compressed npz"):
        arrays = {name: value.numpy() for name, value in values.items()}
        (np.savez if kind == "npz" else np.savez_compressed)(folder / "x.npz", **arrays)
        return "x.npz"
    torch.save(values | {"k": torch.tensor(7), "name": "TopK", "more": {"k": 3, "who": None}}, folder / "x.pt")
    return "x.pt"


KINDS = ("safetensors", "npz", "compressed npz", "pt")


@pytest.mark.parametrize("kind", KINDS)
def test_entries_and_values(kind, tmp_path):
    name = write(kind, tmp_path)
    source = Source(tmp_path)
    assert source.files == (name,)
    assert source.entries(name) == {key: Entry(tuple(t.shape), t.dtype) for key, t in tensors().items()}
    for key, value in tensors().items():
        assert torch.equal(source.values(name, key), value)
    assert source.number(name, "k") == 7
    with pytest.raises(InputError, match="lacks the tensor 'V'"):
        source.values(name, "V")


@pytest.mark.parametrize("kind", ["safetensors", "npz", "pt"])
def test_values_are_views_of_the_file_and_writing_reaches_no_file(kind, tmp_path):
    name = write(kind, tmp_path)
    before = (tmp_path / name).read_bytes()
    assert str(tmp_path / name) in maps_after(lambda: Source(tmp_path).values(name, "W"))
    value = Source(tmp_path).values(name, "W")
    value.fill_(1)
    assert (tmp_path / name).read_bytes() == before
    assert not torch.equal(Source(tmp_path).values(name, "W"), value)


def maps_after(read):
    """What is mapped into this process while the value is there."""
    value = read()
    with open("/proc/self/maps", encoding="utf-8") as file:
        found = file.read()
    del value
    return found


def test_what_a_pt_file_holds_besides_tensors(tmp_path):
    name = write("pt", tmp_path)
    source = Source(tmp_path)
    assert source.other(name, "name") == "TopK"
    assert source.other(name, "more") == {"k": 3, "who": None}
    assert source.other(name, "W") is None
    assert source.other(name, "nothing") is None
    with pytest.raises(InputError, match="name is no single number"):
        source.number(name, "name")
    torch.save({"model": {"W": torch.ones(2), "deep": {"b": torch.ones(1)}}, "k": 5}, tmp_path / "y.pt")
    assert set(source.entries("y.pt")) == {"model/W", "model/deep/b"}
    assert source.number("y.pt", "k") == 5


def test_columns_first_and_big_endian_arrays(tmp_path):
    np.savez(tmp_path / "x.npz", f=np.asfortranarray(np.arange(6.0).reshape(2, 3)), big=np.ones(3, ">f4"))
    source = Source(tmp_path)
    assert torch.equal(source.values("x.npz", "f"), torch.arange(6.0, dtype=torch.float64).view(2, 3))
    assert set(source.entries("x.npz")) == {"f"}


def test_a_files_folder_and_what_lies_beside_it(tmp_path):
    write("npz", tmp_path)
    write("pt", tmp_path)
    (tmp_path / "cfg.json").write_text('{"d_in": 3}')
    source = Source(tmp_path / "x.pt")
    assert (source.alone, source.folder, source.files) == ("x.pt", tmp_path, ("cfg.json", "x.pt"))
    assert source.json("cfg.json") == {"d_in": 3}
    with pytest.raises(InputError, match=r"cfg\.json"):
        source.json("cfg.json", list[int])


def test_a_folder_is_looked_at_to_a_bound(tmp_path):
    deep = tmp_path / "a" / "b" / "c" / "d"
    deep.mkdir(parents=True)
    for folder in (tmp_path, deep.parent, deep):
        (folder / "x.json").write_text("{}")
    (tmp_path / ".hidden").write_text("")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert Source(tmp_path).files == ("a/b/c/x.json", "x.json")


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return (open, (self.file, "w"))


@pytest.mark.parametrize("how", ["zip", "bare"])
def test_a_malicious_pickle_is_refused_and_does_not_run(how, tmp_path):
    trap, file = Trap(tmp_path / "ran"), tmp_path / "x.pt"
    if how == "zip":
        torch.save({"W": torch.ones(2), "k": trap}, file)
    else:
        file.write_bytes(pickle.dumps(trap))
    for look in (Source(tmp_path).entries, lambda name: Source(tmp_path).values(name, "W")):
        with pytest.raises(InputError) as caught:
            look("x.pt")
        assert len(str(caught.value).splitlines()) == 1
        assert not (tmp_path / "ran").exists()
    if how == "zip":
        assert "open" in str(caught.value), "says what was found"
        # The trap is one: whoever unpickles it runs it.
        torch.load(file, weights_only=False)["k"].close()
        assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_a_malicious_array_is_left_out_and_does_not_run(write, tmp_path):
    write(tmp_path / "x.npz", W=np.ones(2, np.float32), trap=np.array([Trap(tmp_path / "ran")], dtype=object))
    source = Source(tmp_path)
    assert set(source.entries("x.npz")) == {"W"}
    assert torch.equal(source.values("x.npz", "W"), torch.ones(2))
    with pytest.raises(InputError, match="lacks the tensor 'trap'"):
        source.values("x.npz", "trap")
    assert not (tmp_path / "ran").exists()
    # The trap is one: whoever unpickles it runs it.
    np.load(tmp_path / "x.npz", allow_pickle=True)["trap"][0].close()
    assert (tmp_path / "ran").exists()


def test_a_module_that_was_pickled_whole_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(InputError, match="save the state_dict"):
        Source(tmp_path).entries("x.pt")
    torch.save([torch.ones(2)], tmp_path / "x.pt")
    with pytest.raises(InputError, match="holds a list: expected a dictionary"):
        Source(tmp_path).entries("x.pt")


def header(tensors):
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def absurd(kind, file):
    """A small file that says that it holds 2^60 bytes."""
    if kind == "safetensors":
        file.write_bytes(
            header({"W": {"dtype": "F32", "shape": [2**29, 2**29], "data_offsets": [0, 2**60]}}) + bytes(64)
        )
        return
    if kind == "pt":
        # A view with steps of 0, of one number.
        torch.save({"W": torch.ones(1).expand(2**29, 2**29)}, file)
        return
    start = io.BytesIO()
    np.lib.format.write_array_header_1_0(start, {"descr": "<f4", "fortran_order": False, "shape": (2**29, 2**29)})
    how = zipfile.ZIP_DEFLATED if kind == "compressed npz" else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", how) as archive:
        archive.writestr("W.npy", start.getvalue() + bytes(64))


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_beyond_the_file_are_refused_at_once(kind, tmp_path):
    name = f"x.{kind.split()[-1]}"
    absurd(kind, tmp_path / name)
    with pytest.raises(InputError, match=r"x\.\w+"):
        Source(tmp_path).entries(name)


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_whose_directory_lies_about_sizes(how, tmp_path):
    start = io.BytesIO()
    np.lib.format.write_array_header_1_0(start, {"descr": "<f4", "fortran_order": False, "shape": (2**29, 2**29)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w", how) as archive:
        archive.writestr("W.npy", start.getvalue() + bytes(64))
        archive.getinfo("W.npy").file_size = len(start.getvalue()) + 2**60
    with pytest.raises(
        InputError, match=r"x\.npz: W\.npy has shape \(536870912, 536870912\) by its header, and another"
    ):
        Source(tmp_path).entries("x.npz")


@pytest.mark.parametrize("shape", [(5, 4), (5, 2), (5,)])
def test_an_array_of_another_size_than_its_header_says(shape, tmp_path):
    start = io.BytesIO()
    np.lib.format.write_array_header_1_0(start, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("W.npy", start.getvalue() + bytes(4 * 15))
        archive.writestr("much", bytes(1000))
    with pytest.raises(InputError, match=r"has shape .* by its header"):
        Source(tmp_path).entries("x.npz")


def test_a_deflated_file_that_unpacks_to_what_it_says_is_no_bomb(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", W=np.zeros((1000, 1000), np.float32))
    assert os.path.getsize(tmp_path / "x.npz") < 10_000
    assert Source(tmp_path).values("x.npz", "W").shape == (1000, 1000)


def test_archives_that_torch_would_read_as_garbage(tmp_path):
    torch.save({"W": torch.ones(100)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as old,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(InputError, match="compressed"):
        Source(tmp_path).entries("y.pt")
    torch.save({"W": torch.ones(100)}, tmp_path / "z.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"version 1\.6"):
        Source(tmp_path).entries("z.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_were_cut_short(kind, tmp_path):
    name = write(kind, tmp_path)
    whole = (tmp_path / name).read_bytes()
    for size in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(InputError) as caught:
            Source(tmp_path).entries(name)
        assert name in str(caught.value)


def test_paths_that_hold_nothing(tmp_path):
    for path in (tmp_path / "nowhere", "", "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(InputError):
            Source(path)
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(InputError, match="it is a pipe or a device"):
        Source(tmp_path / "pipe.pt")
    with pytest.raises(InputError, match="it is a pipe or a device"):
        Source(tmp_path).entries("pipe.pt")
    with pytest.raises(InputError, match="does not exist"):
        Source(tmp_path).entries("x.pt")
