"""The custom ops: PyTorch implementations in `ops.py`, `decoding.py` and `attention.py` specify them, devices have their own.

This is the one place that tells PyTorch of them: what computes the ops on which device, and the compiler's pass.
"""

import torch

from . import decoding, ops
from .cpu import linear as cpu_linear
from .cuda import linear as cuda_linear


def join_products() -> None:
    """Give PyTorch's compiler the pass of `joining.py`, whose imports take longer than those of this package."""
    try:
        from .joining import register
    except ImportError:  # a torch whose compiler takes no passes
        return
    register()


ops.implement("cpu", cpu_linear.products)
ops.implement("cuda", cuda_linear.products)
torch.library.impl("sab::attend", "cuda", cuda_linear.attend)
decoding.implement("cuda", cuda_linear.folded_products)
ops.when_compiled(join_products)
