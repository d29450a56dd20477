"""docs/vision-audio.md: its flags, arguments and links exist, and what it says of names and positions is so."""

import dataclasses
import inspect
import re
from pathlib import Path

import item_models

from saefast.cli.harvest import HarvestArgs
from saefast.data.shards import ShardFolder
from saefast.harvest import HarvestConfig, harvest, harvest_batches, live_source, live_sources
from saefast.harvest.image_folder import ENDINGS
from saefast.harvest.sound import OTHERS, WAV

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs/vision-audio.md").read_text(encoding="utf-8")


def test_flags_and_links_exist() -> None:
    known = {field.name for config in (HarvestConfig, HarvestArgs) for field in dataclasses.fields(config)}
    # Of `saefast train`, and the name of hooks on the command line.
    known |= {"hook", "live", "n_latents", "k", "n_tokens"}
    asked = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]+)", PAGE)}
    assert asked
    assert asked <= known
    for link in re.findall(r"\]\(([\w./-]+\.md)\)", PAGE):
        assert (ROOT / "docs" / link).is_file()
    for function in (harvest, harvest_batches, live_source, live_sources):
        assert {"items", "processor"} <= inspect.signature(function).parameters.keys()


def test_endings_are_those_that_are_read() -> None:
    for ending in (*ENDINGS, *WAV, *OTHERS):
        if ending not in (".jpeg", ".tif", ".wave", ".aif"):  # other spellings
            assert ending[1:] in PAGE


def test_the_first_patch_is_at_position_1_and_leads_to_its_file(tmp_path: Path) -> None:
    item_models.pictures(tmp_path / "photos", 3)
    settings = HarvestConfig(hooks=("layers.1",), images=str(tmp_path / "photos"), device="cpu", heldout=0.0)
    model, processor = item_models.model("vit"), item_models.processor("vit")
    harvest(tmp_path / "acts", settings, model=model, processor=processor, progress=False)
    folder = ShardFolder(tmp_path / "acts")
    shard = folder.open(folder.shards()[0])
    assert sorted(set(shard.pos.tolist())) == list(range(1, 17))
    for seq in shard.seq.tolist():
        assert (tmp_path / "photos" / folder.item(seq)).is_file()
