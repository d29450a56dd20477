"""A run from its first batch to the SAE that it leaves: feed, loop, run folder, checkpoints, plan."""

from saefast.training.api import train
from saefast.training.finetune import finetune
from saefast.training.finetune_config import FinetuneConfig
from saefast.training.plan import Plan, make_plan
from saefast.training.several import Member, train_many

__all__ = ["FinetuneConfig", "Member", "Plan", "finetune", "make_plan", "train", "train_many"]
