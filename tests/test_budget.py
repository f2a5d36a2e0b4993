"""The budget against stored bytes: met from below, and not by more than one byte of columns more would cost."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sab_hf.budget import Allocation, allocate, average_bits
from sab_hf.config import MAX_PLANES
from sab_hf.packing import stored_bytes

SHAPES = {"q": (96, 64), "k": (32, 64), "up": (500, 64), "down": (64, 500), "odd": (3, 77)}

shape_dicts = st.lists(st.tuples(st.integers(1, 600), st.integers(1, 600)), min_size=1, max_size=6).map(
    lambda shapes: {f"layer{i}": shape for i, shape in enumerate(shapes)}
)


def uniform(shapes: dict[str, tuple[int, int]], num_planes: int) -> float:
    """Bits per weight of full planes only, from a plain count: signs, row scales, column scales."""
    total = sum(num_planes * (n * math.ceil(m / 8) + 2 * n + 2 * m) for n, m in shapes.values())
    return 8 * total / sum(n * m for n, m in shapes.values())


@given(shapes=shape_dicts, share=st.floats(0, 0.999))
@settings(deadline=None)
def test_budget_is_met_from_below_and_spent(shapes, share):
    bits = uniform(shapes, 1) + share * (uniform(shapes, MAX_PLANES) - uniform(shapes, 1))
    allocation = allocate(shapes, bits)
    assert allocation.num_significant.keys() == shapes.keys()
    assert average_bits(shapes, allocation) <= bits
    assert uniform(shapes, allocation.num_planes + 1) > bits
    for name, columns in allocation.num_significant.items():
        assert columns % 8 == 0
        assert 0 <= columns < shapes[name][1] or columns == 0
    wider = {name: columns + 8 for name, columns in allocation.num_significant.items()}
    assert average_bits(shapes, Allocation(allocation.num_planes, wider)) > bits


def test_budget_spends_the_same_share_everywhere():
    allocation = allocate(SHAPES, 1.7)
    shares = {name: allocation.num_significant[name] / m for name, (_, m) in SHAPES.items()}
    assert min(shares.values()) > 0
    for name, (_, m) in SHAPES.items():
        assert max(shares.values()) - 8 / m <= shares[name]


@given(shapes=shape_dicts)
@settings(deadline=None)
def test_budget_of_exactly_the_floor_is_one_plane(shapes):
    floor = average_bits(shapes, Allocation(1, dict.fromkeys(shapes, 0)))
    assert floor == pytest.approx(uniform(shapes, 1))
    assert allocate(shapes, floor) == (1, dict.fromkeys(shapes, 0))


@given(shapes=shape_dicts)
@settings(deadline=None)
def test_budget_below_the_floor_states_a_floor_that_works(shapes):
    floor = average_bits(shapes, Allocation(1, dict.fromkeys(shapes, 0)))
    below = math.nextafter(floor, 0)
    with pytest.raises(ValueError, match=re.escape(f"got {below}")) as error:
        allocate(shapes, below)
    stated = float(re.search(r"`bits` must be at least ([\d.]+) ", str(error.value))[1])
    assert floor <= stated <= floor + 0.0011
    assert allocate(shapes, stated).num_planes == 1
    assert "modules_to_not_convert" in str(error.value)


@pytest.mark.parametrize(("bits", "planes"), [(1.01, 1), (2.0, 1), (2.02, 2), (3.0, 2), (4.04, 4), (9.0, 8)])
def test_budget_buys_full_planes_first(bits, planes):
    shapes = {"a": (4096, 4096), "b": (4096, 4096)}
    allocation = allocate(shapes, bits)
    assert allocation.num_planes == planes
    assert bits - 0.01 < average_bits(shapes, allocation) <= bits or bits == 9.0
    assert allocation.num_planes <= MAX_PLANES


def test_budget_of_none_is_one_plane_and_a_tenth_of_the_columns():
    shapes = {"square": (4096, 4096), "wide": (256, 11008), "narrow": (50, 100), "tiny": (50, 16)}
    allocation = allocate(shapes, None)
    assert allocation == (1, {"square": 408, "wide": 1096, "narrow": 8, "tiny": 0})
    assert average_bits({"square": (4096, 4096)}, Allocation(1, {"square": 408})) == pytest.approx(1.112, abs=1e-3)


def test_average_bits_weighs_matrices_by_their_weights():
    allocation = Allocation(1, {"q": 16, "odd": 0})
    shapes = {name: SHAPES[name] for name in ("q", "odd")}
    total = stored_bytes(96, 64, 1, 16) + stored_bytes(3, 77, 1, 0)
    assert average_bits(shapes, allocation) == pytest.approx(8 * total / (96 * 64 + 3 * 77))
