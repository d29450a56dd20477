"""Other names for two of `saefast.ops`."""

from saefast.ops.encode_topk import encode_topk
from saefast.ops.spmm import spmm as decode

__all__ = ["decode", "encode_topk"]
