"""Runs the PTX that Triton emits on a CPU and reports what a GPU would not forgive. See docs/ptx.md."""
