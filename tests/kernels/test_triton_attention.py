"""The kernels of attention in Triton's interpreter, against PyTorch's in float64."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from test_attention import MASKS, SIZES, dense, problem
from triton_cases import interpreted


@interpreted
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_kernels_attend_as_pytorch_does(size, mask):
    from sab_hf.kernels.cuda.attention import attend

    dtype = torch.float16 if size[2] == 2 else torch.float32
    given = problem(size, mask, dtype)
    found = attend(*given, 0.3)
    torch.testing.assert_close(found.double(), dense(*given, 0.3), rtol=1e-5, atol=2 * torch.finfo(dtype).eps)
    assert found.transpose(1, 2).is_contiguous()
