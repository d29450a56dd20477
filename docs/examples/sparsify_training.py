"""sparsify's Trainer, once its own and once saefast's, on a stand-in for a language model.

pip install saefast eai-sparsify
python docs/examples/sparsify_training.py --d-in 768 --n-latents 32768 --batch 1024 --steps 10
"""

import tempfile

import torch
from datasets import Dataset
from side_by_side import Run, Sizes, rows, show, sizes
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from torch import Tensor, nn

# In your own script only this line changes: it takes the place of the import of Trainer above.
from saefast.integrations.sparsify_training import Trainer as SaefastTrainer


class Rows(nn.Module):
    """Stands in for a language model: token i's activation at the module `site` is row i of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.site, self.device = table, nn.Identity(), table.device
        self.base_model = self
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.site(self.table[input_ids])


def train(trainer_class: type, sizes: Sizes, data: list[Tensor]) -> Run:
    """One run of Trainer.fit; but for its class there is no difference between the two."""
    run = Run()
    ids = torch.arange(sizes.steps * sizes.batch).view(sizes.steps, sizes.batch)
    dataset = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SparseCoderConfig(num_latents=sizes.n_latents, k=sizes.k), batch_size=1, optimizer="adam",
            hookpoints=["site"], lr_warmup_steps=5, log_to_wandb=False, save_dir=folder,
        )  # fmt: skip
        model = Rows(torch.cat(data))
        trainer = trainer_class(config, dataset, model)
        model.register_forward_pre_hook(lambda *_: run.note_time())
        trainer.saes["site"].register_forward_hook(lambda _, __, out: run.losses.append(out.fvu.item()))
        trainer.fit()
    return run


def main() -> None:
    chosen = sizes(__doc__)
    data = rows(chosen)
    show("sparsify", train(Trainer, chosen, data), train(SaefastTrainer, chosen, data))


if __name__ == "__main__":
    main()
