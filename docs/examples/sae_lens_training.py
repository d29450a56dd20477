"""SAELens' training loop, once with its own SAETrainer and once with saefast's.

pip install saefast sae-lens
python docs/examples/sae_lens_training.py --d-in 768 --n-latents 32768 --batch 1024 --steps 10
"""

from typing import Any

import torch
from sae_lens import LoggingConfig, SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from side_by_side import Run, Sizes, rows, show, sizes
from torch import Tensor

# In your own script only this line changes: it takes the place of the import of SAETrainer above.
from saefast.integrations.sae_lens_training import SAETrainer as SaefastSAETrainer


def train(trainer: type, sizes: Sizes, data: list[Tensor]) -> Run:
    """One run of fit(); but for the trainer's class there is no difference between the two."""
    run = Run()

    class Noting(trainer):
        def step(self, batch: Tensor) -> Any:
            found = super().step(batch)
            run.losses.append(found.loss.item())
            return found

    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=sizes.d_in, d_sae=sizes.n_latents, k=sizes.k, device=sizes.device))
    config = SAETrainerConfig(
        total_training_samples=sizes.steps * sizes.batch, train_batch_size_samples=sizes.batch, device=sizes.device,
        lr=3e-4, lr_end=3e-5, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    Noting(config, sae, run.batches(data)).fit()
    run.note_time()
    return run


def main() -> None:
    chosen = sizes(__doc__)
    data = rows(chosen)
    show("SAELens", train(SAETrainer, chosen, data), train(SaefastSAETrainer, chosen, data))


if __name__ == "__main__":
    main()
