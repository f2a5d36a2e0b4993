"""The file format: against NumPy's bit packing and a reader written from the specification's table alone."""

import itertools
import math
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import random_planes, sizes
from hypothesis import given, settings
from hypothesis import strategies as st

from sab_hf.packing import from_tensors, pack_bits, stored_bytes, tensor_specs, to_tensors, unpack_bits
from sab_hf.planes import SignPlanes

FIELDS = SignPlanes.__dataclass_fields__


@given(shape=st.lists(st.integers(0, 20), min_size=1, max_size=3), seed=st.integers(0, 2**16))
@settings(deadline=None)
def test_pack_bits_inverts_and_equals_numpy(shape, seed):
    bits = np.random.default_rng(seed).random(shape) < 0.5
    packed = pack_bits(torch.from_numpy(bits))
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], math.ceil(shape[-1] / 8))
    assert np.array_equal(packed.numpy(), np.packbits(bits, axis=-1, bitorder="little"))
    assert torch.equal(unpack_bits(packed, shape[-1]), torch.from_numpy(bits))


def test_pack_bits_puts_the_first_column_in_the_lowest_bit():
    columns = torch.zeros(11, dtype=torch.bool)
    columns[[0, 3, 8, 10]] = True
    assert pack_bits(columns).tolist() == [0b0000_1001, 0b0000_0101]


@given(size=sizes(), seed=st.integers(0, 2**16))
@settings(deadline=None)
def test_to_tensors_inverts_bitwise_through_a_file(size, seed):
    planes = random_planes(*size, seed=seed)
    tensors = safetensors.torch.load(safetensors.torch.save(to_tensors(planes)))
    restored = from_tensors(tensors, planes.shape[1])
    for name in FIELDS:
        one, two = getattr(planes, name), getattr(restored, name)
        assert (one is None) == (two is None), name
        if one is not None:
            assert one.dtype == two.dtype, name
            assert torch.equal(one, two), name


@given(size=sizes())
@settings(deadline=None)
def test_stored_bytes_equals_the_tensors_that_are_stored(size):
    tensors = to_tensors(random_planes(*size))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == tensor_specs(*size)
    assert stored_bytes(*size) == sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize(("planes", "columns", "bits"), [(1, 0, 1.008), (1, 408, 1.112), (2, 0, 2.016), (4, 0, 4.031)])
def test_stored_bytes_gives_the_bits_of_the_method_page(planes, columns, bits):
    assert stored_bytes(4096, 4096, planes, columns) * 8 / 4096**2 == pytest.approx(bits, abs=5e-4)


def test_to_tensors_stores_scales_as_the_bits_of_binary16():
    planes = SignPlanes(
        torch.ones(1, 2, 3, dtype=torch.bool), torch.tensor([[1.0, -2.0]]), torch.tensor([[1 / 3, 6e-8, 0.0]])
    )
    tensors = to_tensors(planes)
    assert tensors["row_scale"].tolist() == [[0x3C00, 0xC000 - 0x10000]]
    assert tensors["col_scale"].tolist() == [[0x3555, 0x0001, 0x0000]]


def read_bytes(tensors: dict[str, torch.Tensor], in_features: int) -> np.ndarray:
    """Read a matrix from raw bytes, following the table in `packing.py` word for word."""
    raw = {name: bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()) for name, tensor in tensors.items()}

    def scales(name: str) -> tuple[float, ...]:
        return struct.unpack(f"<{len(raw[name]) // 2}e", raw[name])

    def bit(name: str, row: int, columns: int, j: int) -> int:
        return raw[name][row * math.ceil(columns / 8) + j // 8] >> (j % 8) & 1

    K, n, m = *tensors["row_scale"].shape, in_features
    r, c = scales("row_scale"), scales("col_scale")
    W = np.zeros((n, m))
    for k, i, j in itertools.product(range(K), range(n), range(m)):
        W[i, j] += (2 * bit("signs", k * n + i, m, j) - 1) * r[k * n + i] * c[k * m + j]
    if "significant_columns" in raw:
        columns = [j for j in range(m) if bit("significant_columns", 0, m, j)]
        r, c = scales("residual_row_scale"), scales("residual_col_scale")
        for i, (at, j) in itertools.product(range(n), enumerate(columns)):
            W[i, j] += (2 * bit("residual_signs", i, len(columns), at) - 1) * r[i] * c[at]
    return W


@pytest.mark.parametrize("size", [(5, 13, 2, 9), (1, 8, 1, 0), (7, 1, 3, 1), (3, 17, 4, 17)])
def test_to_tensors_can_be_read_from_the_specification(size):
    planes = random_planes(*size)
    np.testing.assert_allclose(read_bytes(to_tensors(planes), size[1]), planes.dense().numpy(), atol=1e-5)


def test_to_tensors_of_transposed_planes_can_be_saved():
    planes = random_planes(16, 24)
    transposed = SignPlanes(planes.signs.transpose(1, 2), planes.col_scale, planes.row_scale)
    tensors = safetensors.torch.load(safetensors.torch.save(to_tensors(transposed)))
    assert torch.equal(from_tensors(tensors, 16).dense(), planes.dense().T)


@pytest.mark.parametrize("marked", [0, 2, 4, 11])
def test_from_tensors_rejects_a_damaged_mask(marked):
    tensors = to_tensors(random_planes(4, 11, num_significant=3))
    tensors["significant_columns"] = pack_bits(torch.arange(11) < marked)
    with pytest.raises(ValueError, match=f"must mark 3 columns, .* got {marked}; the tensors are damaged"):
        from_tensors(tensors, 11)
