"""The stateless ops, exact on every backend: encode, decode, their transposes, groups of entries."""

from saefast.ops.encode_batch_topk import encode_batch_topk
from saefast.ops.encode_group_max import encode_group_max
from saefast.ops.encode_topk import encode_topk
from saefast.ops.sddmm import sddmm
from saefast.ops.spmm import spmm
from saefast.ops.spmm_t import spmm_t
from saefast.ops.sum_by_latent import sum_by_latent
from saefast.ops.threshold_encode import threshold_encode

__all__ = [
    "encode_batch_topk",
    "encode_group_max",
    "encode_topk",
    "sddmm",
    "spmm",
    "spmm_t",
    "sum_by_latent",
    "threshold_encode",
]
