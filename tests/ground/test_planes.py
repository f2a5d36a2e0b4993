"""`SignPlanes.dense` against the sum written out weight by weight."""

import itertools

import pytest
import torch
from helpers import random_planes, sizes
from hypothesis import given, settings
from hypothesis import strategies as st

from sab_hf.planes import SignPlanes, signs_to


@given(size=sizes(largest=9), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=50)
def test_dense_equals_the_sum_written_out(size, seed):
    planes = random_planes(*size, seed=seed)
    assert (*planes.shape, planes.num_planes, planes.num_significant) == size
    columns = [] if planes.significant_columns is None else planes.significant_columns.nonzero().flatten().tolist()
    dense = planes.dense()
    for i, j in itertools.product(*map(range, planes.shape)):
        expected = sum(
            (1 if planes.signs[k, i, j] else -1) * float(planes.row_scale[k, i]) * float(planes.col_scale[k, j])
            for k in range(planes.num_planes)
        )
        if j in columns:
            at = columns.index(j)
            sign = 1 if planes.residual_signs[i, at] else -1
            expected += sign * float(planes.residual_row_scale[i]) * float(planes.residual_col_scale[at])
        assert float(dense[i, j]) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 2048.0), (torch.bfloat16, 256.0)])
def test_dense_sums_in_float32(dtype, large):
    """2048 + 1 is 2048 in float16: planes added one after the other in the low dtype would lose both ones."""
    planes = SignPlanes(torch.ones(3, 1, 1, dtype=torch.bool), torch.tensor([[large], [1.0], [1.0]]), torch.ones(3, 1))
    assert planes.dense(dtype) == torch.tensor(large + 2, dtype=dtype)
    assert planes.dense(dtype).dtype == dtype


def test_signs_to_leaves_the_signs_alone():
    signs = torch.tensor([True, False])
    assert signs_to(torch.float32, signs).tolist() == [1.0, -1.0]
    assert signs.tolist() == [True, False]
