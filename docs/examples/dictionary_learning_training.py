"""dictionary_learning's trainSAE, once with its own TopKTrainer and once with saefast's.

pip install saefast dictionary-learning
python docs/examples/dictionary_learning_training.py --d-in 768 --n-latents 32768 --batch 1024 --steps 10
"""

from typing import Any

from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from side_by_side import Run, Sizes, rows, show, sizes
from torch import Tensor

# In your own script only this line changes: it takes the place of the import of TopKTrainer above.
from saefast.integrations.dictionary_learning_training import TopKTrainer as SaefastTopKTrainer


def train(trainer: type, sizes: Sizes, data: list[Tensor]) -> Run:
    """One run of trainSAE; but for the trainer's class there is no difference between the two."""
    run = Run()

    class Noting(trainer):
        def update(self, step: int, x: Tensor) -> Any:
            run.losses.append(super().update(step, x))

    config = dict(
        trainer=Noting, activation_dim=sizes.d_in, dict_size=sizes.n_latents, k=sizes.k, steps=sizes.steps, layer=0,
        lm_name="synthetic", warmup_steps=5, seed=0, device=sizes.device,
    )  # fmt: skip
    trainSAE(data=run.batches(data), trainer_configs=[config], steps=sizes.steps, device=sizes.device)
    return run


def main() -> None:
    chosen = sizes(__doc__)
    data = rows(chosen)
    show("dictionary_learning", train(TopKTrainer, chosen, data), train(SaefastTopKTrainer, chosen, data))


if __name__ == "__main__":
    main()
