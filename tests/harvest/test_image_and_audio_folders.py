"""Folders of images and sound through a model's own processor, from Python and from the command line."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import item_models
import numpy as np
import pytest
import torch
from item_models import blocks, rows_of

from saefast.cli.main import main
from saefast.data.shards import ShardFolder
from saefast.errors import InputError
from saefast.harvest import HarvestConfig, harvest
from saefast.harvest.sound import samples_of
from saefast.latents.database import LatentsDB

N = 14


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return item_models.pictures(tmp_path_factory.mktemp("pictures"), N)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return item_models.save(tmp_path_factory.mktemp("vit"), "vit")


def config(hook: str, **other: Any) -> HarvestConfig:
    return HarvestConfig(**{"hooks": (hook,), "dtype": "float32", "device": "cpu", "heldout": 0.2, **other})


@pytest.mark.parametrize("batch_items", [5, 100])
@pytest.mark.parametrize("kind", ["vit", "clip_vision"])
def test_rows_of_images_are_those_of_each_alone(kind: str, batch_items: int, pictures: Path, tmp_path: Path) -> None:
    from PIL import Image

    model, processor = item_models.model(kind), item_models.processor(kind)
    settings = config("layers.1", images=str(pictures), batch_items=batch_items)
    report = harvest(tmp_path / "h", settings, model=model, processor=processor, progress=False)
    opened, found = ShardFolder(tmp_path / "h"), rows_of(tmp_path / "h", "layers.1")
    names = [opened.item(i) for i in range(opened.n_sequences)]
    files = sorted(file for file in pictures.rglob("*.*"))
    assert names == [file.relative_to(pictures).as_posix() for file in files]
    assert (report.kind, report.sequences, opened.kind) == ("images", N, "images")
    assert opened.index["processor"] == type(processor).__name__
    module = model.get_submodule(opened.index["hooks"][0]["hf_name"])
    for i, file in enumerate(files):
        with Image.open(file) as image:
            inputs = processor(images=image.convert("RGB"), return_tensors="pt")
        expected = blocks(model, module, dict(inputs))
        for t in range(1, 17):
            # Beside others a product of matrices may be added up in another order.
            torch.testing.assert_close(found.pop((i, t)), expected[0, t], rtol=1e-4, atol=1e-5)
    assert not found


def test_an_image_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    upright, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to be seen upright
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    model, processor = item_models.model("vit"), item_models.processor("vit")
    settings = config("layers.1", images=str(tmp_path), heldout=0.0)
    harvest(tmp_path / "h", settings, model=model, processor=processor, progress=False)
    found = rows_of(tmp_path / "h", "layers.1")
    for t in range(1, 17):
        # Threads share a batch out, so that a product of matrices may be added up in another order for its second half.
        torch.testing.assert_close(found[0, t], found[1, t], rtol=1e-4, atol=1e-5)


def test_images_that_do_not_open_are_skipped_and_named(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "p")
    (tmp_path / "p/a/00 broken.png").write_bytes(b"no picture")
    whole = (tmp_path / "p/a/01.jpg").read_bytes()
    (tmp_path / "p/a/02 short.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "p/a/.hidden.png").write_bytes(b"not looked at")
    (tmp_path / "p/read me.txt").write_text("not looked at", encoding="utf-8")
    model, processor = item_models.model("vit"), item_models.processor("vit")
    # The first group of one has no row, nor even a width.
    for batch_items in (1, 16):
        out = tmp_path / f"h{batch_items}"
        settings = config("layers.1", images=str(tmp_path / "p"), batch_items=batch_items)
        report = harvest(out, settings, model=model, processor=processor, progress=False)
        assert len(report.skipped) == report.n_skipped == 2
        assert report.skipped[0] == (
            "a/00 broken.png is no image that opens (UnidentifiedImageError: cannot identify image file)"
        )
        assert report.skipped[1].startswith("a/02 short.jpg is no image that opens (OSError: image file is truncated")
        assert report.sequences == N + 2
        assert {i for i, _ in rows_of(out, "layers.1")} == set(range(N + 2)) - {0, 2}


def test_a_killed_harvest_of_images_goes_on_to_the_same_rows(pictures: Path, tmp_path: Path) -> None:
    model, processor = item_models.model("vit"), item_models.processor("vit")
    settings = config("layers.1", images=str(pictures), batch_items=4, rows_per_shard=30)
    harvest(tmp_path / "whole", settings, model=model, processor=processor, progress=False)
    passes = 0

    def stop(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 4:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        harvest(tmp_path / "part", settings, model=model, processor=processor, progress=False)
    handle.remove()
    assert not ShardFolder(tmp_path / "part").index["complete"]
    harvest(tmp_path / "part", settings, model=model, processor=processor, progress=False)
    first, second = (rows_of(tmp_path / name, "layers.1") for name in ("whole", "part"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_another_folder_does_not_go_on(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "p")
    model, processor = item_models.model("vit"), item_models.processor("vit")
    limited = config("layers.1", images=str(tmp_path / "p"), batch_items=4, max_items=4)
    harvest(tmp_path / "h", limited, model=model, processor=processor, progress=False)
    first = next(file for file in sorted((tmp_path / "p").rglob("*.*")))
    first.rename(first.with_name("00 renamed.png"))
    with pytest.raises(InputError, match=r"p is not what the harvest began with \(its first 4 items differ\)"):
        harvest(
            tmp_path / "h", config("layers.1", images=str(tmp_path / "p")), model=model, processor=processor,
            progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_of_a_wav_file(width: int, channels: int, tmp_path: Path) -> None:
    written = item_models.sound(tmp_path / "a.wav", 0.01, width=width, channels=channels)
    read = samples_of(tmp_path / "a.wav", 20, 90)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, written[20:90].mean(1), rtol=0, atol=2.0**-23)


def test_samples_of_a_wav_file_of_floats(tmp_path: Path) -> None:
    wavfile = pytest.importorskip("scipy.io.wavfile")
    written = np.random.default_rng(0).standard_normal((100, 2)).astype(np.float32)
    wavfile.write(tmp_path / "a.wav", 16_000, written)
    np.testing.assert_array_equal(samples_of(tmp_path / "a.wav", 5, 50), written[5:50].mean(1, dtype=np.float32))


def sounds(folder: Path) -> Path:
    """One file shorter than a second, one longer, one at another rate."""
    item_models.sound(folder / "a.wav", 0.4, seed=1)
    item_models.sound(folder / "b.wav", 2.5, seed=2)
    item_models.sound(folder / "c.wav", 0.5, rate=8000, seed=3)
    return folder


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2", "wav2vec2_mask"])
def test_rows_of_sound_are_those_of_each_stretch_alone(kind: str, tmp_path: Path) -> None:
    signal = pytest.importorskip("scipy.signal")
    sounds(tmp_path / "s")
    hook = "encoder.layers.1"
    model, processor = item_models.model(kind), item_models.processor(kind)
    settings = config(hook, audio=str(tmp_path / "s"), audio_seconds=1.0)
    report = harvest(tmp_path / "h", settings, model=model, processor=processor, progress=False)
    opened, found = ShardFolder(tmp_path / "h"), rows_of(tmp_path / "h", hook)
    names = [opened.item(i) for i in range(opened.n_sequences)]
    stretches = ["b.wav#t=0.000,0.833", "b.wav#t=0.833,1.667", "b.wav#t=1.667,2.500"]
    assert names == ["a.wav", *stretches, "c.wav"]
    assert (report.kind, report.n_skipped) == ("audio", 0)
    edges = [40_000 * i // 3 for i in range(4)]
    pieces = [samples_of(tmp_path / "s/a.wav", 0, 6400)]
    pieces += [samples_of(tmp_path / "s/b.wav", *edges[i : i + 2]) for i in range(3)]
    pieces += [signal.resample_poly(samples_of(tmp_path / "s/c.wav", 0, 4000), 2, 1).astype(np.float32)]
    for i, piece in enumerate(pieces):
        inputs = processor(piece, sampling_rate=item_models.RATE, return_tensors="pt")
        if kind == "whisper":
            expected = blocks(model.encoder, model.encoder.layers[1], {"input_features": inputs["input_features"]})
            # A frame of the encoder is two of the spectrogram, which are 160 samples each.
            n = -(-len(piece) // 320)
        else:
            expected = blocks(model, model.encoder.layers[1], {"input_values": inputs["input_values"]})
            n = expected.shape[1]
        for t in range(n):
            torch.testing.assert_close(found.pop((i, t)), expected[0, t], rtol=1e-4, atol=1e-5)
    assert not found


def test_stretches_of_a_file_are_on_one_side(tmp_path: Path) -> None:
    for i in range(6):
        item_models.sound(tmp_path / f"s/{i}.wav", 2.5, seed=i)
    model, processor = item_models.model("wav2vec2"), item_models.processor("wav2vec2")
    settings = config("encoder.layers.1", audio=str(tmp_path / "s"), audio_seconds=1.0, heldout=0.4)
    harvest(tmp_path / "h", settings, model=model, processor=processor, progress=False)
    opened = ShardFolder(tmp_path / "h")
    sides = [
        {opened.item(i).split("#")[0] for info in opened.shards(split) for i in opened.open(info).seq.tolist()}
        for split in ("train", "heldout")
    ]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_sound_that_cannot_be_read_is_skipped_and_named(tmp_path: Path) -> None:
    sounds(tmp_path / "s")
    (tmp_path / "s/0.wav").write_bytes(b"RIFF nothing")
    whole = (tmp_path / "s/a.wav").read_bytes()
    (tmp_path / "s/d.wav").write_bytes(whole[:2000])
    item_models.sound(tmp_path / "s/e.wav", 0.01)
    (tmp_path / "s/f.wav").write_bytes(whole[:24] + (2**31).to_bytes(4, "little") + whole[28:])
    model, processor = item_models.model("wav2vec2"), item_models.processor("wav2vec2")
    settings = config("encoder.layers.1", audio=str(tmp_path / "s"))
    report = harvest(tmp_path / "h", settings, model=model, processor=processor, progress=False)
    assert report.skipped[0].startswith("0.wav is no ")
    assert report.skipped[1:] == [
        "d.wav holds 978 samples where its header says 6400",
        "e.wav is shorter than 0.025 seconds, which models of sound take for a frame",
        "f.wav claims to have 2147483648 samples a second",
    ]


def test_other_rates_without_scipy_are_refused_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item_models.sound(tmp_path / "s/a.wav", 0.4, rate=8000)
    monkeypatch.setitem(sys.modules, "scipy.signal", None)
    model, processor = item_models.model("wav2vec2"), item_models.processor("wav2vec2")
    with pytest.raises(
        InputError, match=r"has 8000 samples a second, the model's feature extractor takes 16000.*scipy"
    ):
        harvest(
            tmp_path / "h", config("encoder.layers.1", audio=str(tmp_path / "s")), model=model, processor=processor,
            progress=False,
        )  # fmt: skip


def run(*words: str) -> int:
    return main([str(word) for word in words])


def test_from_the_command_line_to_an_evaluation(
    pictures: Path, vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, trained = tmp_path / "acts", tmp_path / "run"
    words = ["harvest", "--out", out, "--model", vit, "--images", pictures, "--hook", "layers.1", "--heldout", "0.2"]
    assert run(*words) == 0
    said = capsys.readouterr().out
    assert f"{N * 16} rows in {out}" in said
    assert "patches/s" in said
    assert run(*words) == 0
    assert "already complete" in capsys.readouterr().out
    assert run("train", out, "--out", trained, "--n-latents", "32", "--k", "4", "--n-tokens", "640",
               "--batch-size", "32") == 0  # fmt: skip
    metadata = json.loads((trained / "config.json").read_text(encoding="utf-8"))["metadata"]
    assert metadata["dataset_path"] == str(pictures)
    capsys.readouterr()
    assert run("eval", trained) == 0
    written = json.loads((trained / "eval.json").read_text(encoding="utf-8"))
    assert written["lm_left_out"] == "the folder holds rows of images, not of text"
    assert 0 < written["metrics"]["fvu"] < 1
    assert (written["about"]["kind"], written["about"]["data"]) == ("images", str(pictures))
    capsys.readouterr()
    assert run("features", trained) == 0
    db = LatentsDB(trained / "latents.db")
    assert (db.meta["kind"], db.meta["unit"], db.meta["grid"]) == (
        "images",
        "patches",
        {"rows": 4, "columns": 4, "first": 1},
    )
    assert db.meta["images"] == {"shown": N, "missing": 0, "whole": False, "why": None}
    sequences = {example.context.sequence for latent in range(32) for example in db.examples(latent)}
    assert sequences == set(range(N))
    assert all(db.image(sequence) for sequence in sequences)


def test_sound_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = item_models.save(tmp_path / "whisper", "whisper")
    sounds(tmp_path / "s")
    words = ["harvest", "--out", tmp_path / "acts", "--model", folder, "--audio", tmp_path / "s"]
    assert run(*words, "--hook", "encoder.layers.1") == 0
    assert "frames/s" in capsys.readouterr().out
    trained = tmp_path / "run"
    assert run("train", tmp_path / "acts", "--out", trained, "--n-latents", "32", "--k", "4", "--n-tokens", "640",
               "--batch-size", "32") == 0  # fmt: skip
    assert run("features", trained) == 0
    db = LatentsDB(trained / "latents.db")
    assert (db.meta["kind"], db.meta["unit"], db.meta["contexts"]["why"]) == (
        "audio",
        "frames",
        "sound is not shown yet",
    )
    assert max(db.latent(latent).max_act for latent in range(32)) > 0
    capsys.readouterr()
    assert run(*words, "--hook", "layers.1") == 2
    assert "encoder.layers" in capsys.readouterr().err
    assert (
        run("harvest", "--out", tmp_path / "no", "--model", folder, "--text", tmp_path, "--hook", "encoder.layers.1")
        == 2
    )
    assert "WhisperModel reads input_features" in capsys.readouterr().err


WRONG = [
    (["--images", "nowhere"], "images is 'nowhere': there is no such folder or file"),
    (["--images", "{vit}"], "holds no images (png, jpg"),
    (["--audio", "{pictures}"], "processor of"),
    (["--images", "{pictures}", "--text", "x.txt"], "text is 'x.txt', but images are no text: leave it out"),
    (["--images", "{pictures}", "--audio", "{pictures}"], "images and audio are given: harvest one of them"),
    (["--images", "{pictures}", "--max-tokens", "9"], "but images are no text: leave it out; give max_items"),
    (["--images", "{pictures}", "--data-parallel", "2"], "harvested by one process so far: leave out --data-parallel"),
    (["--images", "{pictures}", "--hook", "embeddings.patch_embeddings.projection"], "say with feature_maps whether"),
    (["--text", "{pictures}", "--batch-items", "4"], "batch_items is 4, but text is harvested: it is for images"),
]


@pytest.mark.parametrize(("words", "why"), WRONG, ids=[" ".join(case[0][::2]) for case in WRONG])
def test_wrong_commands_end_in_one_line(
    words: list[str], why: str, pictures: Path, vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(pictures=pictures, vit=vit) for word in words]
    hook = [] if "--hook" in words else ["--hook", "layers.1"]
    assert run("harvest", "--out", tmp_path / "h", "--model", vit, *hook, *words) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1
    assert not (tmp_path / "h").exists()


def test_without_pillow_images_are_refused(pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="images are read with Pillow, which is not installed: pip install pillow"):
        harvest(
            tmp_path / "h", config("layers.1", images=str(pictures)), model=item_models.model("vit"),
            processor=item_models.processor("vit"), progress=False,
        )  # fmt: skip


def test_a_folder_without_one_image_that_opens_leaves_nothing(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(b"no picture")
    model, processor = item_models.model("vit"), item_models.processor("vit")
    with pytest.raises(InputError, match=r"no row was kept, 0 patches dropped; a.png is no image.* \(3 skipped\)"):
        harvest(
            tmp_path / "h", config("layers.1", images=str(tmp_path)), model=model, processor=processor, progress=False
        )
    assert not (tmp_path / "h").exists()


def test_images_that_the_processor_refuses_are_skipped(pictures: Path, tmp_path: Path) -> None:
    model, processor = item_models.model("vit"), item_models.processor("vit")

    class Picky:
        model_input_names = ("pixel_values",)

        def __call__(self, images: Any, **other: Any) -> Any:
            if images.width > 40:
                raise ValueError("too wide")
            return processor(images=images, **other)

    settings = config("layers.1", images=str(pictures))
    report = harvest(tmp_path / "h", settings, model=model, processor=Picky(), progress=False)
    assert 0 < report.n_skipped < N
    assert all(line.endswith("is refused by the Picky (ValueError: too wide)") for line in report.skipped)
    assert len({i for i, _ in rows_of(tmp_path / "h", "layers.1")}) == N - report.n_skipped
