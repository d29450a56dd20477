"""A run from its first batch to the SAE that it leaves: feed, loop, run folder, checkpoints, plan."""

from saefast.training.api import train
from saefast.training.plan import Plan, make_plan
from saefast.training.several import Member, train_many

__all__ = ["Member", "Plan", "make_plan", "train", "train_many"]
