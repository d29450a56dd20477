"""Images small enough to show: what the model saw, and its patches where they are on it."""

import io
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import item_models
import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("transformers")
from PIL import Image, ImageDraw

from saefast.data.mapped_source import MappedSource
from saefast.data.opening import open_source
from saefast.data.shards import ShardFolder
from saefast.errors import InputError
from saefast.harvest.to_disk import HarvestConfig, harvest
from saefast.latents import images
from saefast.latents.contexts import write_sequences
from saefast.latents.examples import examples
from saefast.latents.images import LONGEST, as_seen, write_images
from saefast.latents.schema import create
from saefast.latents.spool import Spool, spool_codes
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

SIDE, PATCH = item_models.SIDE, item_models.PATCH
GRID = SIDE // PATCH


def harvested(folder: Path, pictures: Path, kind: str = "vit", hook: str = "layers.1", **settings: Any) -> Path:
    config = HarvestConfig(hooks=(hook,), dtype="float32", forward="float32", device="cpu", heldout=0.2,
                           images=str(pictures), **settings)  # fmt: skip
    harvest(folder, config, model=item_models.model(kind), processor=item_models.processor(kind), progress=False)
    return folder


def opened(data: Path) -> MappedSource:
    source = open_source(data, shuffle="mapped")
    assert isinstance(source, MappedSource)
    return source


def pass_over(sae: SAE, source: MappedSource, folder: Path) -> tuple[sqlite3.Connection, Spool]:
    """A database with sequences, contexts and examples, as write_images finds it."""
    rows = [batch for split in ("heldout", "train") for batch in source.located(split, 64)]
    spool = spool_codes(sae, rows, folder)
    db = create(folder / "latents.db")
    contexts = write_sequences(db, spool, source, None)
    entries = spool.by_latent(0, spool.n_latents)
    most = np.zeros(spool.n_latents, np.float32)
    np.maximum.at(most, entries.latent(), entries.acts)
    columns = [column.tolist() for column in examples(entries, 0, spool, contexts, most)]
    db.executemany("INSERT INTO examples VALUES (?, ?, ?, ?, ?, ?)", zip(*columns, strict=True))
    return db, spool


def written(folder: Path, data: Path, processor: Any, **other: Any) -> tuple[dict[str, Any], sqlite3.Connection]:
    source = opened(data)
    sae = SAE(SAEConfig(d_in=source.d_in, n_latents=24, k=3), seed=0)
    db, spool = pass_over(sae, source, folder)
    assert source.folder is not None
    return write_images(db, spool, source.folder, processor, **other), db


def shown(db: sqlite3.Connection) -> dict[str, Image.Image]:
    """Images by the names of their files."""
    rows = db.execute("SELECT name, mime, data FROM images JOIN sequences USING (sequence)").fetchall()
    found = {name: Image.open(io.BytesIO(data)) for name, _, data in rows}
    assert all(mime == Image.MIME[found[name].format or ""] for name, mime, _ in rows)
    return found


@pytest.mark.parametrize("kind", ["vit", "clip_vision"])
def test_images_are_what_the_model_saw(kind: str, tmp_path: Path) -> None:
    pictures = item_models.pictures(tmp_path / "p", 14)
    processor = item_models.processor(kind)
    facts, db = written(tmp_path, harvested(tmp_path / "acts", pictures, kind), processor)
    found = shown(db)
    assert facts["images"] == {"shown": len(found), "missing": 0, "whole": False, "why": None}
    assert facts["grid"] == {"rows": GRID, "columns": GRID, "first": 1}
    assert len(found) > 5
    for name, image in found.items():
        with Image.open(pictures / name) as given:
            pixels = processor(images=given.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
        expected = ((pixels * std + mean) * 255).permute(1, 2, 0).numpy()
        assert np.abs(np.asarray(image, np.float32) - expected).max() <= 0.51


POSITIONS: list[tuple[str, str, dict[str, Any], dict[str, int]]] = [
    ("vit", "layers.1", {}, {"rows": 4, "columns": 4, "first": 1}),
    ("vit", "layers.1", {"keep_special_tokens": True}, {"rows": 4, "columns": 4, "first": 1}),
    ("vit", "embeddings.patch_embeddings", {}, {"rows": 4, "columns": 4, "first": 0}),
    ("registers", "layers.1", {}, {"rows": 4, "columns": 4, "first": 5}),
    ("dinov2", "layers.1", {}, {"rows": 4, "columns": 4, "first": 1}),
    ("siglip_vision", "layers.1", {}, {"rows": 4, "columns": 4, "first": 0}),
    ("swin", "layers.0", {}, {"rows": 4, "columns": 4, "first": 0}),
    ("resnet", "encoder.stages.0", {"feature_maps": "channels_first"}, {"rows": 8, "columns": 8, "first": 0}),
]


@pytest.mark.parametrize(("kind", "hook", "settings", "grid"), POSITIONS)
def test_the_grid_leaves_out_what_stands_before_the_patches(
    kind: str, hook: str, settings: dict[str, Any], grid: dict[str, int], tmp_path: Path
) -> None:
    pictures = item_models.pictures(tmp_path / "p", 8)
    facts, _ = written(tmp_path, harvested(tmp_path / "acts", pictures, kind, hook, **settings),
                       item_models.processor(kind))  # fmt: skip
    assert facts["grid"] == grid


def patch_of(colour: str) -> torch.Tensor:
    """What the model's patch embedding makes of a patch of one colour."""
    pixels = item_models.processor("vit")(images=Image.new("RGB", (SIDE, SIDE), colour), return_tensors="pt")
    with torch.no_grad():
        patches: torch.Tensor = item_models.model("vit").embeddings.patch_embeddings(pixels["pixel_values"])
    return patches[0, 0]


@pytest.mark.parametrize(("hook", "first"), [("embeddings.patch_embeddings", 0), ("embeddings", 1)])
def test_the_patch_that_is_shaded_is_the_one_that_the_latent_fires_on(hook: str, first: int, tmp_path: Path) -> None:
    """Pictures with one red square each: a latent that tells red from blue fires where it is drawn. At the second hook
    a CLS token stands before the patches, and each has an embedding of its place besides."""
    places = [(row, column) for row in range(GRID) for column in range(GRID)]
    (tmp_path / "p").mkdir()
    for row, column in places:
        picture = Image.new("RGB", (3 * SIDE, 3 * SIDE), "blue")
        x, y, side = 3 * PATCH * column, 3 * PATCH * row, 3 * PATCH
        ImageDraw.Draw(picture).rectangle((x, y, x + side - 1, y + side - 1), fill="red")
        picture.save(tmp_path / "p" / f"{row}{column}.png")
    source = opened(harvested(tmp_path / "acts", tmp_path / "p", hook=hook))
    red, blue = patch_of("red"), patch_of("blue")
    sae = SAE(SAEConfig(d_in=len(red), n_latents=4, k=1, apply_b_dec_to_input=False), seed=0)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.W_enc[2] = red - blue
        sae.b_enc.zero_()
        sae.b_enc[2] = -float((red - blue) @ (red + blue) / 2)
    db, spool = pass_over(sae.requires_grad_(False), source, tmp_path)
    assert source.folder is not None
    grid = write_images(db, spool, source.folder, item_models.processor("vit"))["grid"]
    assert grid == {"rows": GRID, "columns": GRID, "first": first}
    found = db.execute(
        "SELECT name, position, data FROM examples JOIN contexts USING (context) JOIN sequences USING (sequence) "
        "JOIN images USING (sequence) WHERE latent = 2"
    ).fetchall()
    assert {name for name, _, _ in found} == {f"{row}{column}.png" for row, column in places}
    for name, position, data in found:
        row, column = divmod(position - grid["first"], grid["columns"])
        assert name == f"{row}{column}.png"
        pixels = np.asarray(Image.open(io.BytesIO(data)), np.int32)
        each = pixels.shape[0] // grid["rows"]
        patch = pixels[row * each : (row + 1) * each, column * each : (column + 1) * each]
        # Its middle, for resizing blurs the edges.
        assert (patch[2:-2, 2:-2, 0] > 200).all()
        assert (patch[2:-2, 2:-2, 2] < 60).all()


def test_a_turned_photograph_is_shown_as_it_was_seen(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    picture = Image.new("RGB", (60, 40), "blue")
    ImageDraw.Draw(picture).rectangle((0, 0, 29, 39), fill="red")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: the left side is the top
    picture.save(tmp_path / "p" / "a.jpg", exif=exif, quality=95)
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "p" / "b.png")
    facts, db = written(tmp_path, harvested(tmp_path / "acts", tmp_path / "p"), item_models.processor("vit"))
    pixels = np.asarray(shown(db)["a.jpg"], np.int32)
    assert pixels[4, 16, 0] > 200
    assert pixels[28, 16, 2] > 200
    assert facts["grid"]["rows"] == GRID


def test_large_images_become_small(tmp_path: Path) -> None:
    import transformers

    large = transformers.ViTImageProcessorPil(size={"height": 512, "width": 384})
    image = as_seen(large, Image.effect_noise((900, 700), 80).convert("RGB"))
    assert image.size == (384, 512)
    small = images._small(image, (512, 384))
    assert small.mime == "image/webp"
    assert Image.open(io.BytesIO(small.data)).size == (LONGEST * 384 // 512, LONGEST)
    assert images.grid_of(_positions(1, 48 * 64 + 1), (512, 384)) == {"rows": 64, "columns": 48, "first": 1}


def _positions(lowest: int, n: int) -> Any:
    class Positions:
        n_rows = 1
        position = np.array([lowest, n - 1], np.uint16)

    return Positions()


@pytest.mark.parametrize(("lowest", "n", "grid"), [(1, 197, (14, 1)), (5, 261, (16, 5)), (0, 197, (14, 1)),
                                                   (0, 196, (14, 0)), (0, 1, (1, 0)), (2, 198, (14, 2))])  # fmt: skip
def test_grids_of_square_images(lowest: int, n: int, grid: tuple[int, int]) -> None:
    side, first = grid
    found = images.grid_of(_positions(lowest, n), (224, 224))
    assert found == {"rows": side, "columns": side, "first": first}


def test_no_grid_fits(tmp_path: Path) -> None:
    assert images.grid_of(_positions(1, 8), (224, 224)) is None


def test_files_that_are_gone_are_counted_and_left_out(tmp_path: Path) -> None:
    pictures = item_models.pictures(tmp_path / "p", 10)
    data = harvested(tmp_path / "acts", pictures)
    files = sorted(pictures.rglob("*.*"))
    files[0].unlink()
    files[1].write_bytes(b"no image")
    facts, db = written(tmp_path, data, item_models.processor("vit"))
    names = {file.relative_to(pictures).as_posix() for file in files}
    gone = names - set(shown(db))
    assert facts["images"]["missing"] == len(gone) == 2
    assert facts["grid"] is not None
    pictures.rename(tmp_path / "moved")
    (tmp_path / "again").mkdir()
    facts, db = written(tmp_path / "again", data, item_models.processor("vit"))
    assert facts["images"]["shown"] == 0
    assert facts["grid"] is None


def test_names_lead_to_files_below_the_folder_alone(tmp_path: Path) -> None:
    class Named(ShardFolder):
        def __init__(self, name: str) -> None:
            self.name, self.index, self.path = name, {"data": str(tmp_path / "p")}, tmp_path

        def item(self, seq: int) -> str:
            return self.name

    for name in ("../secret.png", "a/../../secret.png", "/etc/secret.png"):
        assert images._file(Named(name), 0) is None
    assert images._file(Named("a/b c.png"), 0) == tmp_path / "p" / "a" / "b c.png"


def test_a_folder_that_was_named_from_elsewhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item_models.pictures(tmp_path / "p", 6)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    data = harvested(Path("runs/acts"), Path("p"))
    assert ShardFolder(data).index["data"] == "p"
    monkeypatch.chdir("/")
    (tmp_path / "db").mkdir()
    facts, _ = written(tmp_path / "db", tmp_path / "runs" / "acts", item_models.processor("vit"))
    assert facts["images"]["missing"] == 0
    assert facts["images"]["shown"] > 0


def test_without_the_processor_whole_files_are_shown_and_a_word_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(name: str, kind: str, revision: str | None) -> None:
        raise InputError(f"processor of {name!r} cannot be loaded: offline")

    monkeypatch.setattr(images, "load_processor", offline)
    pictures = item_models.pictures(tmp_path / "p", 8)
    facts, db = written(tmp_path, harvested(tmp_path / "acts", pictures), None)
    assert facts["images"]["whole"]
    why = "whole files are shown, not what the model saw of them: processor of 'ViTModel' cannot be loaded: offline"
    assert facts["images"]["why"] == why
    assert facts["grid"] == {"rows": GRID, "columns": GRID, "first": 1}
    for name, image in shown(db).items():
        with Image.open(pictures / name) as given:
            assert image.size == given.size


def odd(what: str) -> Callable[..., Any]:
    def made(images: Any, return_tensors: str) -> dict[str, torch.Tensor]:
        if what == "fails":
            raise ValueError("no")
        return {"pixel_values": torch.zeros(4, 5) if what == "flat" else torch.zeros(1, 1, 4, 4)}

    return made


@pytest.mark.parametrize("what", ["fails", "flat", "grey"])
def test_what_is_no_picture_is_not_shown_as_one(what: str) -> None:
    assert as_seen(odd(what), Image.new("RGB", (20, 20))) is None


def test_the_images_of_the_strongest_examples_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MOST", 3)
    pictures, done = item_models.pictures(tmp_path / "p", 12), []
    facts, db = written(tmp_path, harvested(tmp_path / "acts", pictures), item_models.processor("vit"),
                        advance=done.append)  # fmt: skip
    assert facts["images"]["shown"] == len(done) == 3
    strongest = db.execute(
        "SELECT DISTINCT sequence FROM examples JOIN contexts USING (context) WHERE part = 0 AND rank = 0"
    ).fetchall()
    assert {sequence for (sequence,) in db.execute("SELECT sequence FROM images")} <= {one for (one,) in strongest}


def test_text_and_other_inputs_have_no_images(tmp_path: Path) -> None:
    items = [{"pixel_values": torch.randn(6, 3, SIDE, SIDE)}]
    config = HarvestConfig(hooks=("layers.1",), dtype="float32", device="cpu", heldout=0.2)
    harvest(tmp_path / "acts", config, model=item_models.model("vit"), items=items, progress=False)
    facts, _ = written(tmp_path, tmp_path / "acts", None)
    assert facts == {
        "grid": None,
        "images": {"shown": 0, "missing": 0, "whole": False,
                   "why": "the rows are of inputs, which leave no files to show"},
    }  # fmt: skip


def test_without_pillow_a_word_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = harvested(tmp_path / "acts", item_models.pictures(tmp_path / "p", 6))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    facts, _ = written(tmp_path, data, None)
    assert "Pillow, which is not installed: pip install pillow" in facts["images"]["why"]
