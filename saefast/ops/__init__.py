"""The stateless ops, exact on every backend: encode, decode, their transposes, groups of entries."""

from saefast.ops.dispatch import encode_topk, sddmm, spmm, spmm_t, sum_by_latent, threshold_encode

__all__ = ["encode_topk", "sddmm", "spmm", "spmm_t", "sum_by_latent", "threshold_encode"]
