"""What is likely to go wrong in a run, said before its first step: settings that its length makes pointless."""

from saefast.engines.recipe import Recipe, lr_factor

# 100,000 tokens of MiniLM's layer 4 (2,048 latents, k = 32, the best of three rates) end at a held-out FVU of 0.354,
# 0.262, 0.208, 0.178, 0.158 and 0.150 in 12, 25, 50, 100, 200 and 400 steps.
FEW_STEPS = 100
# A rate that comes back this many times higher after the decay undoes what the decay had settled.
JUMP = 2.0


def advice(
    config: Recipe,
    total_steps: int,
    tokens: int,
    step: int = 0,
    before: tuple[int, float] | None = None,
) -> dict[str, str]:
    """One line about each setting that the length of a run makes pointless: what was seen, and what to set.

    Args:
        total_steps: optimiser steps of the run.
        tokens: tokens of the run.
        step: where it goes on from.
        before: of a run that goes on: how many steps it was to have, and the learning rate of the last one done.

    Returns:
        The lines by their subject: "warmup", "steps", "dead", "resample", "resume" or "plateau". Empty where all is
        well, and where no step is left to do.
    """
    if step >= total_steps:
        return {}
    peak = config.lr
    found = {
        "warmup": _warmup(config, total_steps, peak),
        "steps": _steps(config, total_steps, tokens),
        "dead": _dead(config, total_steps, tokens),
        "resample": _resample(config, total_steps),
        "resume": _resume(config, total_steps, peak, step, before),
        "plateau": _plateau(config, total_steps),
    }
    return {subject: line for subject, line in found.items() if line}


def _warmup(config: Recipe, total_steps: int, peak: float) -> str:
    if config.lr_warmup_steps < total_steps:
        return ""
    highest = peak * max(lr_factor(step, total_steps, config) for step in (0, total_steps - 1))
    outcome = f"reaches {highest:.2g} of {peak:.2g}" if highest else "is 0, so nothing is trained"
    return (
        f"lr_warmup_steps is {config.lr_warmup_steps:,}, and the run has {_counted(total_steps)}: the learning rate "
        f"{outcome}; set lr_warmup_steps to {total_steps // 20}, or train on more tokens"
    )


def _steps(config: Recipe, total_steps: int, tokens: int) -> str:
    if total_steps >= FEW_STEPS:
        return ""
    # A run of one step may be of fewer tokens than its one batch.
    smaller = tokens // FEW_STEPS if total_steps > 1 else 0
    remedy = f"set batch_size to {smaller:,} or less" if smaller else "lower batch_size"
    return (
        f"the run has {_counted(total_steps)} of {config.batch_size:,} tokens, and an SAE needs {FEW_STEPS} or more "
        f"updates to learn: {remedy}, or train on more tokens"
    )


def _dead(config: Recipe, total_steps: int, tokens: int) -> str:
    longest = total_steps if config.dead_unit == "steps" else tokens
    if config.dead_after - config.dead_start <= longest:
        return ""
    resamples = config.resample_every if config.resample_steps is None else len(config.resample_steps)
    idle = [what for what, on in (("AuxK never runs", config.auxk_coef), ("none is resampled", resamples)) if on]
    so = f", so {' and '.join(idle)}" if idle else ""
    return (
        f"dead_after is {config.dead_after:,} {config.dead_unit}, and the run has {longest:,}: no latent can be called "
        f"dead{so}; set dead_after to about {max(longest // 5, 1):,}"
    )


def _resample(config: Recipe, total_steps: int) -> str:
    if not config.resample_steps or config.resample_steps[0] < total_steps:
        return ""
    return (
        f"resample_steps begin at {config.resample_steps[0]:,}, and the run has {_counted(total_steps)}: no latent is "
        f"resampled in time to learn; set them lower, the first to {max(total_steps // 40, 1):,} perhaps, or train on "
        "more tokens"
    )


def _resume(config: Recipe, total_steps: int, peak: float, step: int, before: tuple[int, float] | None) -> str:
    if before is None or step < config.lr_warmup_steps:
        return ""
    (total_before, was), now = before, peak * lr_factor(step, total_steps, config)
    if now <= JUMP * was:
        return ""
    return (
        f"the learning rate had fallen to {was:.2g} by step {step:,} of {total_before:,}, and jumps back to "
        f"{now:.2g} now that the run has {total_steps:,}: the loss rises before it falls again; to keep one "
        "smooth decay, train anew with all the tokens"
    )


def _plateau(config: Recipe, total_steps: int) -> str:
    # The first step of a decay has the peak rate still, the second has not.
    if not config.stop_at_plateau or lr_factor(config.lr_warmup_steps + 1, total_steps, config) == 1:
        return ""
    return (
        "stop_at_plateau is set, and the learning rate stays at its peak for no part of the run, which is where a "
        "plateau is looked for: lower lr_decay_share, or raise lr_decay_start"
    )


def _counted(steps: int) -> str:
    return f"{steps:,} step" if steps == 1 else f"{steps:,} steps"
