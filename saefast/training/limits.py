"""What a run may ask for: sizes that no machine holds are refused before anything is allocated."""

import torch

from saefast.engines.config import PEERS_BATCH
from saefast.engines.recipe import Recipe
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.placement import require_memory
from saefast.training.plan import Sizes, memory_of


def check_sizes(sae_config: SAEConfig, config: Recipe, device: torch.device) -> None:
    """Raises InputError for an impossible run: a batch of more than its tokens, or more memory than the device has.

    Args:
        config: its n_tokens are the whole run's. Fewer than a batch of a peer's preset are allowed: they make a run of
            one step.
        device: where it trains; memory is counted as `saefast plan` counts it, which is the least that is needed.
    """
    tokens = config.n_tokens
    if config.batch_size > max(tokens, PEERS_BATCH):
        raise InputError(
            f"batch_size is {config.batch_size}, but the run has only {tokens} tokens: expected at most that; lower "
            "batch_size, or raise n_tokens"
        )
    L, D = sae_config.n_latents, sae_config.d_in
    what = f"training n_latents = {L} of width {D} with batch_size = {config.batch_size}"
    # First by hand: `memory_of` makes meta tensors of these sizes, whose bytes torch counts in 64 bits.
    require_memory(device, 2 * L * D * 2 + config.batch_size * D * 4, what)
    sizes = Sizes.of(sae_config, config)
    ahead = min(config.init_rows, tokens) * D * 4
    require_memory(device, sum(memory_of(sizes, device.type).values()) + ahead, what)
