"""Other people's SAEs, training loops and models, with saefast's kernels inside."""
