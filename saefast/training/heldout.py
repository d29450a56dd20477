"""The held-out figures of a run: all rows at its end, a few of them every so often on the way."""

from typing import Any

import torch

from saefast.engines.recipe import Recipe
from saefast.metrics.streaming import Reconstruction
from saefast.models.sae import SAE
from saefast.training.feed import Feed

# Rows that the last figures of a run are taken over; `saefast eval` looks at all of them.
HELDOUT_ROWS = 1 << 16
# On the way an evaluation costs 1.4 times as much per row as a step (C++, one thread): a row for every 64 that are
# trained on is 2 to 3 % of the time. Those few are spread over eight times as many.
SHARE, SPREAD, FEWEST, MOST = 1 / 64, 8, 128, 1 << 14
# Values of the held-out FVU in a run; a plateau is found sooner with more.
VALUES, VALUES_TO_STOP = 20, 60


def chosen_eval_every(config: Recipe, total_steps: int) -> int:
    """Steps between values of the held-out FVU in a run of so many; 0 is never.

    Where config.eval_every is None there are about 20, on lines of metrics.jsonl that are written anyway.
    """
    if config.eval_every is not None:
        return config.eval_every
    values, lines = VALUES_TO_STOP if config.stop_at_plateau else VALUES, max(config.log_every, 1)
    return max(round(total_steps / values / lines), 1) * lines


def rows_on_the_way(config: Recipe, eval_every: int) -> int:
    """How many held-out rows an evaluation in mid-run looks at."""
    return min(max(int(SHARE * eval_every * config.batch_size), FEWEST), MOST)


@torch.no_grad()
def evaluate_heldout(sae: SAE, feed: Feed, few: int | None = None) -> dict[str, Any]:
    """Figures over (at most HELDOUT_ROWS of) the held-out rows; empty where there are none.

    All rows count, those that training leaves out too; "fvu_ordinary" and "fvu_median" tell of the others.

    In mid-run the SAE is taken as it is: rows without a gradient may be unsettled, which only `finish` changes.

    Args:
        few: look at about so many rows, spread over the first SPREAD times as many; latents that are silent on a few
            rows mean nothing, so their share is left out.

    Raises:
        InputError: a row holds NaN or inf.
    """
    stride, limit = 1, HELDOUT_ROWS
    if few is not None:
        limit = min(check_heldout(feed, min(few * SPREAD, max(few, MOST))), limit)
        stride = max(limit // few, 1)
    reconstruction, fired, n_rows, seen = Reconstruction(feed.ordinary), 0.0, 0, 0
    silent = torch.ones(sae.config.n_latents + 1, dtype=torch.bool, device=sae.device)
    for rows in feed.heldout():
        x, target = (part[-seen % stride : limit - seen : stride] for part in rows)
        x_hat, acts, idx = sae(x)
        reconstruction.update(target, x_hat)
        silent.index_fill_(0, torch.where(acts > 0, idx, sae.config.n_latents).flatten().long(), False)
        fired, n_rows, seen = fired + float((acts != 0).sum()), n_rows + len(x), seen + len(rows.x)
        if seen >= limit:
            break
    if n_rows == 0:
        return {}
    found = reconstruction.compute()
    figures = {name: found[name] for name in ("fvu", "fvu_ordinary", "fvu_median", "explained_variance")}
    figures |= {"l0": fired / n_rows, "rows": n_rows}
    if few is None:
        figures["silent_share"] = float(silent[:-1].double().mean())
    return {f"heldout/{name}": value for name, value in figures.items()}


def check_heldout(feed: Feed, limit: int | None = None) -> int:
    """How many held-out rows there are, counted up to a limit (None is HELDOUT_ROWS). Raises InputError where one
    of these is not finite."""
    n_rows, limit = 0, HELDOUT_ROWS if limit is None else limit
    for x, _ in feed.heldout():
        n_rows += len(x)
        if n_rows >= limit:
            return limit
    return n_rows
