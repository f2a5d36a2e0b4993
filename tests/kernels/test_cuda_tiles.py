"""Which GPU kernel a product gets, tiles that fit any shape, and whether Triton can compile: no Triton, no GPU here."""

import importlib.util
import math
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sab_hf.kernels.cuda import tiles as cuda_tiles
from sab_hf.kernels.cuda.linear import triton_problem

HOPPER, TURING, BLACKWELL = (9, 0), (7, 5), (10, 0)
ROUNDS_INPUTS = ("single", "bits", "int8")
"""Kernels that round activations to integers."""


def kernel(batch, planes=1, rows=3584, words=112, residual_words=0, itemsize=2, exact=False, capability=HOPPER):
    return cuda_tiles.kernel(batch, planes, rows, words, residual_words, itemsize, exact, capability)


@pytest.mark.parametrize("capability", [TURING, BLACKWELL])
def test_devices_whose_tensor_cores_do_not_multiply_bits_use_int8(capability):
    assert kernel(2) == "bits"
    assert kernel(2, capability=capability) == "int8"
    assert kernel(1, words=592, capability=capability) == "int8"


@pytest.mark.parametrize("capability", [HOPPER, TURING, BLACKWELL])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("batch", [1, 2, 8, 16, 100, 300, 5000])
def test_exact_products_do_not_round_activations_to_integers(batch, itemsize, capability):
    for rows in (512, 3584, 37888):
        name = kernel(batch, rows=rows, itemsize=itemsize, exact=True, capability=capability)
        assert name not in ROUNDS_INPUTS
        only_hopper = {"fragments", "fused"} if itemsize == 2 and capability == HOPPER else set()
        assert name in {"dot", "dense"} | only_hopper


@given(
    st.integers(1, 5000), st.integers(1, 4), st.integers(1, 50_000), st.integers(1, 1000), st.integers(0, 100),
    st.booleans(),
)  # fmt: skip
def test_16_bit_products_of_hopper_share_a_kernel_with_others_for_one_plane_of_many_rows_only(
    batch, planes, rows, words, residual_words, exact
):
    if planes > 1 or rows < cuda_tiles.MANY_ROWS or batch <= 8 or batch > (128 if residual_words else 2048):
        assert kernel(batch, planes, rows, words, residual_words, exact=exact) != "dot"
    elif residual_words or batch > 64:
        assert kernel(batch, planes, rows, words, residual_words, exact=exact) == "dot"


def test_a_single_launch_is_for_one_input_of_rows_that_fit():
    assert kernel(1) == "single"
    assert kernel(2) != "single"
    assert kernel(1, words=592) != "single"
    assert kernel(1, planes=4) != "single"
    assert kernel(1, words=112, residual_words=20) != "single"  # 112 + 32 lanes


def test_long_prefill_is_unpacked():
    assert kernel(256, rows=18944, planes=2) == "fused"
    assert kernel(3000, rows=37888) == kernel(256) == kernel(100, rows=512) == "dense"
    assert kernel(512, rows=18944, planes=2) == "dense"
    assert kernel(256, itemsize=4) == "dense"  # float32 does not use tensor cores
    assert kernel(256, capability=TURING) == "dot"
    assert kernel(5000, rows=37888, capability=TURING) == "dense"
    assert kernel(256, planes=2, capability=TURING) == "dense"  # a product for each plane


shapes = st.tuples(
    st.integers(1, 8), st.integers(1, 200_000), st.integers(1, 2000), st.integers(0, 300), st.integers(1, 200)
)


@given(shapes)
def test_tiles_fit_any_shape(shape):
    planes, rows, words, residual_words, processors = shape
    single = cuda_tiles.single_tiles(rows, words, residual_words, processors)
    assert words + single.residual <= single.words
    assert single.residual >= residual_words
    assert single.words % max(single.residual, 1) == 0
    bits = cuda_tiles.bits_tiles(planes, rows, words, residual_words, processors)
    assert bits.warps % bits.split == 0
    for batch in (1, 17, 100, 1000):
        for itemsize in (2, 4):
            dot = cuda_tiles.dot_tiles(rows, words, planes + (residual_words > 0), batch, processors, itemsize)
            assert 16 % dot.words == 0  # activations are padded to 16 words
            assert dot.splits < 2 * math.ceil(words / dot.words)
        fragments = cuda_tiles.fragments_tiles(planes, rows, words, residual_words, processors, batch)
        assert fragments.warps % fragments.split == 0
        assert 8 % cuda_tiles.fused_tiles(planes, rows, words, residual_words, processors, batch).words == 0


@given(st.integers(1, 2000), st.integers(1, 300), st.integers(1, 300), st.booleans())
def test_shares_of_the_work_are_equal_and_complete(tiles, steps, most, shared):
    programs, whole = cuda_tiles.shares(tiles, steps, most, shared)
    assert 1 <= programs <= most
    rest = max(0, tiles - whole * programs)
    if not shared:
        assert rest == 0
        assert (whole - 1) * programs < tiles
    elif rest:
        assert rest * steps >= programs  # each has a part
        assert whole == 0 or programs <= rest < 2 * programs


def test_an_old_or_missing_triton_is_named(monkeypatch):
    old = types.ModuleType("triton")
    old.__version__ = "3.1.0"
    monkeypatch.setitem(sys.modules, "triton", old)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: old)
    assert "3.1.0 is too old" in triton_problem()
    old.knobs = None
    assert triton_problem() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in triton_problem()
