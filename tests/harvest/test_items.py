"""Harvests of inputs that are no text: rows against forward passes written by hand, masks, resume, wrong inputs."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import item_models
import pytest
import torch
from item_models import blocks, rows_of
from tiny_models import documents, tokenizer
from tiny_models import model as text_model

import saefast
from saefast.data.shards import ShardFolder
from saefast.errors import InputError
from saefast.harvest import HarvestConfig, harvest, harvest_batches, live_sources

BATCH, N_BATCHES = 4, 3


def images(n: int = N_BATCHES, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    side = item_models.SIDE
    return [{"pixel_values": torch.randn(BATCH, 3, side, side, generator=generator)} for _ in range(n)]


def config(hook: str = "layers.1", **other: Any) -> HarvestConfig:
    return HarvestConfig(**{"hooks": (hook,), "dtype": "float32", "device": "cpu", "heldout": 0.2, **other})


# Kind of model, and how many positions are in front of the patches.
VISION = [("vit", 1), ("dinov2", 1), ("registers", 5), ("clip_vision", 1), ("siglip_vision", 0)]


@pytest.mark.parametrize("keep", [False, True], ids=["patches", "all"])
@pytest.mark.parametrize(("kind", "front"), VISION, ids=[case[0] for case in VISION])
def test_rows_are_those_of_a_plain_forward_pass(kind: str, front: int, keep: bool, tmp_path: Path) -> None:
    model, given, hook = item_models.model(kind), images(), "layers.1"
    report = harvest(tmp_path / "h", config(hook, keep_special_tokens=keep), model=model, items=given, progress=False)
    found = rows_of(tmp_path / "h", hook)
    hook_path = ShardFolder(tmp_path / "h").index["hooks"][0]["hf_name"]
    module = model.get_submodule(hook_path)
    first = 0 if keep else front
    expected = torch.cat([blocks(model, module, one) for one in given])
    patches = (item_models.SIDE // item_models.PATCH) ** 2
    assert expected.shape[1] == patches + front
    assert report.dropped["special"] == len(expected) * first
    assert report.kind == "inputs"
    assert report.sequences == len(expected)
    assert report.heldout_rows > 0
    assert found.keys() == {(i, t) for i in range(len(expected)) for t in range(first, patches + front)}
    for (i, t), row in found.items():
        assert torch.equal(row, expected[i, t])


def test_clip_is_given_images_alone(tmp_path: Path) -> None:
    model, given, hook = item_models.model("clip"), images(1), "vision_model.encoder.layers.1"
    harvest(tmp_path / "h", config(hook), model=model, items=given, progress=False)
    expected = blocks(model.vision_model, model.get_submodule(hook), given[0])
    assert all(torch.equal(row, expected[i, t]) for (i, t), row in rows_of(tmp_path / "h", hook).items())
    with pytest.raises(
        InputError, match=r"CLIPModel\) failed on pixel_values \(4, 3, 32, 32\).* before it came to text_"
    ):
        harvest(tmp_path / "t", config("text_model.encoder.layers.1"), model=model, items=given, progress=False)


def test_whispers_encoder_needs_no_decoder_inputs(tmp_path: Path) -> None:
    model, hook = item_models.model("whisper"), "encoder.layers.1"
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, item_models.MELS, item_models.FRAMES, generator=generator)
    mask = torch.ones(3, item_models.FRAMES, dtype=torch.int64)
    mask[1, 40:] = 0
    mask[2, 41:] = 0
    given = [{"input_features": features, "attention_mask": mask}]
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    model.decoder.register_forward_pre_hook(count)
    report = harvest(tmp_path / "h", config(hook), model=model, items=given, progress=False)
    # Once to see how often the module runs, which fails there for want of tokens; then passes end at the hook.
    assert runs == 1
    expected = blocks(model.encoder, model.encoder.layers[1], {"input_features": features})
    found = rows_of(tmp_path / "h", hook)
    assert found.keys() == {(i, t) for i, n in enumerate((50, 20, 21)) for t in range(n)}
    assert report.dropped["padding"] == 30 + 29
    assert all(torch.equal(row, expected[i, t]) for (i, t), row in found.items())


def test_padded_sound_keeps_the_frames_of_its_own_length(tmp_path: Path) -> None:
    model, hook = item_models.model("wav2vec2_mask"), "encoder.layers.1"
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 400, generator=generator)
    mask = torch.ones(2, 400, dtype=torch.int64)
    mask[1, 250:] = 0
    values[1, 250:] = 0
    given = [{"input_values": values, "attention_mask": mask}]
    harvest(tmp_path / "h", config(hook), model=model, items=given, progress=False)
    alone = [
        blocks(model, model.encoder.layers[1], {"input_values": values[i : i + 1, :n]}) for i, n in ((0, 400), (1, 250))
    ]
    found = rows_of(tmp_path / "h", hook)
    assert found.keys() == {(i, t) for i, one in enumerate(alone) for t in range(one.shape[1])}
    for (i, t), row in found.items():
        torch.testing.assert_close(row, alone[i][0, t], rtol=1e-4, atol=1e-5)


def test_a_mask_says_which_positions_to_keep(tmp_path: Path) -> None:
    keep = torch.rand(BATCH, 17, generator=torch.Generator().manual_seed(1)) < 0.5
    given = images(1)
    report = harvest(
        tmp_path / "h", config(keep_special_tokens=True), model=item_models.model("vit"),
        items=[(given[0], keep)], progress=False,
    )  # fmt: skip
    assert rows_of(tmp_path / "h", "layers.1").keys() == {(i, t) for i, t in keep.nonzero().tolist()}
    assert report.dropped["padding"] == int((~keep).sum())


def test_names_lead_from_a_row_to_its_item(tmp_path: Path) -> None:
    names = [f"picture {i}" for i in range(BATCH)]
    given = [images(1)[0] | {"names": names}, *images(1, seed=1)]
    harvest(tmp_path / "h", config(), model=item_models.model("vit"), items=given, progress=False)
    opened = ShardFolder(tmp_path / "h")
    assert [opened.item(i) for i in range(8)] == [*names, "4", "5", "6", "7"]
    assert opened.index["input"] == "pixel_values"


def test_copies_are_on_one_side(tmp_path: Path) -> None:
    # Ten of each image, in batches that mix them.
    pixels = torch.cat([one["pixel_values"] for one in images(5)])
    mixed = pixels[torch.randperm(200, generator=torch.Generator().manual_seed(2)) % 20]
    harvest(
        tmp_path / "h", config(heldout=0.3), model=item_models.model("vit"),
        items=[{"pixel_values": part} for part in mixed.split(25)], progress=False,
    )  # fmt: skip
    opened = ShardFolder(tmp_path / "h")
    sides = {
        split: {bytes(mixed[i].numpy().data) for info in opened.shards(split) for i in opened.open(info).seq.tolist()}
        for split in ("train", "heldout")
    }
    assert sides["train"]
    assert sides["heldout"]
    assert not sides["train"] & sides["heldout"]


class Killed(Exception):
    """Ends a harvest without a commit, as a kill does."""


class Stops:
    """Items that end in an error after n batches, counted over all passes."""

    def __init__(self, given: list[Any], n: int, error: type[BaseException]) -> None:
        self._given, self._left, self._error = given, n, error

    def __iter__(self) -> Iterator[Any]:
        for one in self._given:
            self._left -= 1
            if self._left == -1:
                raise self._error
            yield one


@pytest.mark.parametrize("error", [KeyboardInterrupt, Killed])
@pytest.mark.parametrize("rows_per_shard", [20, 1 << 20], ids=["small shards", "large"])
def test_going_on_gives_the_same_rows_to_the_bit(
    rows_per_shard: int, error: type[BaseException], tmp_path: Path
) -> None:
    given, model = images(6), item_models.model("vit")
    settings = config(rows_per_shard=rows_per_shard, max_norm_multiple=1.15)
    whole = harvest(tmp_path / "whole", settings, model=model, items=given, progress=False)
    assert whole.dropped["outlier_norm"] > 0
    # The first pass over them is for the median norm, and meets one batch after another too.
    stopping = Stops(given, 6 + 4, error)
    with pytest.raises(error):
        harvest(tmp_path / "part", settings, model=model, items=stopping, progress=False)
    if error is KeyboardInterrupt or rows_per_shard == 20:
        begun = ShardFolder(tmp_path / "part").index
        assert not begun["complete"]
        # A shard was full in the middle of a batch.
        assert (0 < begun["cursor"]["done"] < BATCH) is (error is Killed)
    else:
        assert not (tmp_path / "part").exists()
    report = harvest(tmp_path / "part", settings, model=model, items=lambda: iter(given), progress=False)
    assert (report.dropped, report.sequences) == (whole.dropped, whole.sequences)
    first, second = (rows_of(tmp_path / name, "layers.1") for name in ("whole", "part"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    names = [[ShardFolder(tmp_path / name).item(i) for i in range(24)] for name in ("whole", "part")]
    assert names[0] == names[1]


def test_a_limit_is_raised_and_all_is_there(tmp_path: Path) -> None:
    given, model = images(4), item_models.model("vit")
    harvest(tmp_path / "h", config(max_items=8), model=model, items=given, progress=False)
    assert ShardFolder(tmp_path / "h").n_sequences == 8
    again = harvest(tmp_path / "h", config(max_items=8), model=model, items=given, progress=False)
    assert again.tokens == 0
    harvest(tmp_path / "h", config(), model=model, items=given, progress=False)
    harvest(tmp_path / "whole", config(), model=model, items=given, progress=False)
    first, second = (rows_of(tmp_path / name, "layers.1") for name in ("h", "whole"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_other_items_or_weights_do_not_go_on(tmp_path: Path) -> None:
    model = item_models.model("vit")
    harvest(tmp_path / "h", config(max_items=4), model=model, items=images(), progress=False)
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "h", kept)
    with pytest.raises(InputError, match="is not what the harvest began with"):
        harvest(tmp_path / "h", config(), model=model, items=images(seed=5), progress=False)
    short = [{"pixel_values": images()[0]["pixel_values"][:2]}]
    with pytest.raises(InputError, match="end after 2 items, before the place to go on from"):
        harvest(tmp_path / "h", config(), model=model, items=short, progress=False)
    used = iter(images())
    next(used)
    with pytest.raises(InputError, match="is not what the harvest began with"):
        harvest(tmp_path / "h", config(), model=model, items=used, progress=False)
    with torch.no_grad():
        model.layers[0].attention.q_proj.weight[0, 0] += 1
    with pytest.raises(InputError, match="was harvested from another model"):
        harvest(tmp_path / "h", config(), model=model, items=images(), progress=False)
    assert (tmp_path / "h/index.json").read_bytes() == (kept / "index.json").read_bytes()


def test_rows_that_are_not_finite_are_dropped_and_counted(tmp_path: Path) -> None:
    given = images(1)
    given[0]["pixel_values"][2] = float("nan")
    with pytest.warns(RuntimeWarning, match="gives NaN or inf in float32 .first at 2, position 1."):
        report = harvest(tmp_path / "h", config(), model=item_models.model("vit"), items=given, progress=False)
    assert report.dropped["not_finite"] == 16
    assert {i for i, _ in rows_of(tmp_path / "h", "layers.1")} == {0, 1, 3}


def test_train_mode_is_left_on_and_not_used(tmp_path: Path) -> None:
    model, given = item_models.model("vit"), images(1)
    model.config.hidden_dropout_prob = 0.5
    expected = blocks(model, model.layers[1], given[0])
    model.train()
    harvest(tmp_path / "h", config(), model=model, items=given, progress=False)
    assert model.training
    assert all(torch.equal(row, expected[i, t]) for (i, t), row in rows_of(tmp_path / "h", "layers.1").items())


MAPS = [
    ("resnet", "encoder.stages.1", "channels_first", (2, 3)),
    ("resnet", "embedder.embedder.convolution", "channels_first", (2, 3)),
]


@pytest.mark.parametrize(("kind", "hook", "maps", "places"), MAPS, ids=["stage", "convolution"])
def test_feature_maps_are_rows_where_it_is_said_which_way_they_lie(
    kind: str, hook: str, maps: Any, places: tuple[int, int], tmp_path: Path
) -> None:
    model, given = item_models.model(kind), images(1)
    with pytest.raises(InputError, match=r"gives \(4, \d+, \d+, \d+\).*say with feature_maps"):
        harvest(tmp_path / "no", config(hook), model=model, items=given, progress=False)
    harvest(tmp_path / "h", config(hook, feature_maps=maps), model=model, items=given, progress=False)
    expected = blocks(model, model.get_submodule(hook), given[0])
    wide = expected.shape[places[1]]
    found = rows_of(tmp_path / "h", hook)
    assert len(found) == 4 * expected.shape[places[0]] * wide
    assert all(torch.equal(row, expected[i, :, t // wide, t % wide]) for (i, t), row in found.items())


def test_a_convolution_over_time_is_not_taken_for_rows(tmp_path: Path) -> None:
    model = item_models.model("whisper")
    given = [{"input_features": torch.randn(2, item_models.MELS, item_models.FRAMES)}]
    with pytest.raises(InputError, match=r"gives \(2, 16, 100\).*say with feature_maps"):
        harvest(tmp_path / "no", config("encoder.conv1"), model=model, items=given, progress=False)
    settings = config("encoder.conv1", feature_maps="channels_first")
    harvest(tmp_path / "h", settings, model=model, items=given, progress=False)
    expected = blocks(model.encoder, model.encoder.conv1, given[0])
    assert all(torch.equal(row, expected[i, :, t]) for (i, t), row in rows_of(tmp_path / "h", "encoder.conv1").items())


def test_pooled_outputs_are_a_row_per_item(tmp_path: Path) -> None:
    model, given = item_models.model("vit"), images(1)
    harvest(tmp_path / "h", config("pooler"), model=model, items=given, progress=False)
    expected = blocks(model, model.pooler, given[0])
    found = rows_of(tmp_path / "h", "pooler")
    assert found.keys() == {(i, 0) for i in range(4)}
    assert all(torch.equal(row, expected[i]) for (i, _), row in found.items())


def test_several_hooks_are_of_the_same_positions(tmp_path: Path) -> None:
    settings = HarvestConfig(hooks=("layers.0", "layers.2"), dtype="float32", device="cpu", heldout=0.2)
    model = item_models.model("vit")
    harvest(tmp_path / "h", settings, model=model, items=images(), progress=False)
    assert rows_of(tmp_path / "h", "layers.0").keys() == rows_of(tmp_path / "h", "layers.2").keys()
    other = HarvestConfig(hooks=("layers.0", "embeddings.patch_embeddings"), dtype="float32", device="cpu")
    with pytest.raises(InputError, match="rows have to be of the same positions"):
        harvest(tmp_path / "no", other, model=model, items=images(), progress=False)


def test_training_while_harvesting() -> None:
    sources = live_sources(config(), model=item_models.model("vit"), items=images(8), reservoir_rows=256)
    lines: list[Any] = []
    saefast.train(
        sources["layers.1"], saefast.SAEConfig(d_in=16, n_latents=32, k=4),
        saefast.TrainConfig(n_tokens=2000, batch_size=64, lr=1e-2), on_log=lines.append, progress=False,
    )  # fmt: skip
    assert lines[-1]["heldout/fvu"] < 1


def test_batches_as_they_are_made() -> None:
    batches = list(harvest_batches(config(), model=item_models.model("vit"), items=iter(images())))
    assert sum(len(batch.seq) for batch in batches) == 12 * 16
    assert {batch.split for batch in batches} == {"train", "heldout"}


WRONG = [
    (5, "items is a int: expected an iterable of mappings, as {'pixel_values': tensor}"),
    (images(1)[0], "items is a dict: expected an iterable"),
    ([], "are none: the iterable is empty, or an iterator that was used up before"),
    ([5], "the batch after 0 items is a int: expected a mapping such as"),
    ([{"pixel_values": [1, 2]}], "pixel_values is a list, expected a tensor"),
    ([{"pixel_values": torch.zeros(())}], r"has shape \(\) for pixel_values"),
    ([{}], "has no tensor for pixel_values"),
    ([(images(1)[0], torch.ones(4, 3).bool())], r"mask of positions has shape \(4, 3\), hook '.*' gives \(4, 17\)"),
    ([(images(1)[0], torch.ones(4, 17))], r"the mask is shape \(4, 17\) and torch.float32, expected \(4, "),
    ([(images(1)[0], torch.arange(4))], "the mask is shape"),
    ([images(1)[0] | {"names": ["a"]}], "names is .*, expected 4 strings"),
    ([{"pixel_values": torch.zeros(2, 1, 32, 32)}], r"ViTModel\) failed on pixel_values \(2, 1, 32, 32\)"),
]  # fmt: skip


@pytest.mark.parametrize(("items", "why"), WRONG, ids=range(len(WRONG)))
def test_wrong_items_are_refused_in_one_line(items: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=why) as refused:
        harvest(tmp_path / "h", config(), model=item_models.model("vit"), items=items, progress=False)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "h").exists()


SETTINGS = [
    ({"ctx_len": 8}, "ctx_len is 8, but items are no text: leave it out"),
    ({"max_tokens": 8}, "max_tokens is 8, but items are no text: leave it out; give max_items"),
    ({"drop_first": 1}, "drop_first is 1, but items are no text"),
    ({"text": "a"}, "text is 'a', but items are no text"),
    ({"images": "a"}, "images and items are given"),
    ({"batch_items": 0}, "batch_items is 0"),
    ({"max_items": 0}, "max_items is 0"),
    ({"hooks": ("layers.9",)}, "layers.9"),
]


@pytest.mark.parametrize(("settings", "why"), SETTINGS, ids=[next(iter(case[0])) for case in SETTINGS])
def test_settings_of_text_are_refused(settings: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=why):
        harvest(tmp_path / "h", config(**settings), model=item_models.model("vit"), items=images(), progress=False)


def test_an_iterator_has_no_first_items_to_read_twice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_norm_multiple reads the first items twice, and items is an iterator"):
        harvest(
            tmp_path / "h", config(max_norm_multiple=3.0), model=item_models.model("vit"), items=iter(images()),
            progress=False,
        )  # fmt: skip


def test_a_model_of_images_is_not_given_text(tmp_path: Path) -> None:
    for kind, reads in (("vit", "ViTModel reads pixel_values"), ("whisper", "WhisperModel reads input_features")):
        with pytest.raises(InputError, match=f"{reads} .its main_input_name., not token ids: give a folder of images"):
            harvest(
                tmp_path / "h", HarvestConfig(hooks=("layers.1",)), model=item_models.model(kind),
                tokenizer=tokenizer(), text=documents(5), progress=False,
            )  # fmt: skip


def test_hooks_in_a_vision_tower_are_not_given_text(tmp_path: Path) -> None:
    settings = HarvestConfig(hooks=("vision_model.encoder.layers.1",))
    with pytest.raises(
        InputError, match="for hooks in what it reads images with, give images or items instead of text"
    ):
        harvest(
            tmp_path / "h", settings, model=item_models.model("clip"), tokenizer=tokenizer(), text=documents(5),
            progress=False,
        )  # fmt: skip


def test_a_model_of_text_is_not_given_images(tmp_path: Path) -> None:
    item_models.pictures(tmp_path / "p", 2)
    settings = config(images=str(tmp_path / "p"))
    with pytest.raises(InputError, match="LlamaModel reads input_ids, not the pixel_values of images"):
        harvest(
            tmp_path / "h", settings, model=text_model("llama"), processor=item_models.processor("vit"), progress=False
        )


def test_hooks_in_a_decoder_are_refused(tmp_path: Path) -> None:
    given = [{"input_features": torch.zeros(2, item_models.MELS, item_models.FRAMES)}]
    with pytest.raises(InputError, match="is outside the encoder of this WhisperModel, whose decoder reads token ids"):
        harvest(
            tmp_path / "h", config("decoder.layers.1"), model=item_models.model("whisper"), items=given, progress=False
        )


def test_a_mask_of_sound_that_does_not_fit_its_positions(tmp_path: Path) -> None:
    mask = torch.ones(2, 90, dtype=torch.int64)
    mask[0, 50:] = 0
    features = torch.zeros(2, item_models.MELS, item_models.FRAMES)
    given = [{"input_features": features, "attention_mask": mask}]
    with pytest.raises(InputError, match=r"attention_mask has shape \(2, 90\), hook 'encoder.layers.1' gives 50 pos"):
        harvest(
            tmp_path / "h", config("encoder.layers.1"), model=item_models.model("whisper"), items=given, progress=False
        )
