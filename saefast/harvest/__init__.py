"""A model and what it reads in, activations out: to a shard folder or straight into training."""

from saefast.harvest.config import HarvestConfig
from saefast.harvest.language_models import load_model, load_tokenizer
from saefast.harvest.live import live_source, live_sources
from saefast.harvest.parts import harvest_parts
from saefast.harvest.reader import HarvestBatch
from saefast.harvest.text import open_text
from saefast.harvest.to_disk import HarvestReport, harvest, harvest_batches

__all__ = [
    "HarvestBatch",
    "HarvestConfig",
    "HarvestReport",
    "harvest",
    "harvest_batches",
    "harvest_parts",
    "live_source",
    "live_sources",
    "load_model",
    "load_tokenizer",
    "open_text",
]
