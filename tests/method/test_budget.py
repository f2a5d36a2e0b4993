"""The budget against stored bytes: met from below, spent, and spent where the loss falls most."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sab_hf.config import MAX_PLANES
from sab_hf.method.budget import REMAINING_ERROR, allocate, average_bits
from sab_hf.packing import stored_bytes

SHAPES = {"q": (96, 64), "k": (32, 64), "up": (500, 64), "down": (64, 500), "odd": (3, 77)}

shape_dicts = st.lists(st.tuples(st.integers(1, 600), st.integers(1, 600)), min_size=1, max_size=6).map(
    lambda shapes: {f"layer{i}": shape for i, shape in enumerate(shapes)}
)


def uniform(shapes: dict[str, tuple[int, int]], num_planes: int) -> float:
    """Bits per weight of full planes only, from a plain count: signs, row scales, column scales."""
    total = sum(num_planes * (n * math.ceil(m / 8) + 2 * n + 2 * m) for n, m in shapes.values())
    return 8 * total / sum(n * m for n, m in shapes.values())


def random_scores(shapes: dict[str, tuple[int, int]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(m, generator=generator).pow(6) * 10 ** float(torch.randn((), generator=generator))
        for name, (_, m) in shapes.items()
    }


def loss(sizes: dict[str, list[int]], scores: dict[str, torch.Tensor]) -> float:
    """The loss that the budget expects, written out column by column."""
    total = 0.0
    for name, (K, k) in sizes.items():
        ranked = sorted(scores[name].tolist(), reverse=True)
        total += sum(REMAINING_ERROR[K + (j < k)] * score for j, score in enumerate(ranked))
    return total


FEW_ROWS = {f"layer{i}": shape for i, shape in enumerate([(1, 1), (1, 1), (1, 197), (1, 201), (1, 60), (133, 1)])}


@given(shapes=shape_dicts, share=st.floats(0, 0.999), scored=st.booleans())
@example(shapes=FEW_ROWS, share=0.875, scored=True)  # a plane takes fewer bytes than a residual plane on most columns
@settings(deadline=None, max_examples=60)
def test_budget_is_met_from_below_and_no_byte_of_columns_more_fits(shapes, share, scored):
    bits = uniform(shapes, 1) + share * (uniform(shapes, MAX_PLANES) - uniform(shapes, 1))
    sizes = allocate(shapes, bits, random_scores(shapes, 0) if scored else None)
    assert sizes.keys() == shapes.keys()
    assert average_bits(shapes, sizes) <= bits
    for name, (K, k) in sizes.items():
        assert k % 8 == 0
        assert 0 <= k < max(1, shapes[name][1])
        assert 1 <= K <= MAX_PLANES
    if scored:
        for name, (K, k) in sizes.items():
            if k + 8 < shapes[name][1] and K < MAX_PLANES:
                assert average_bits(shapes, sizes | {name: [K, k + 8]}) > bits


def test_budget_is_met_within_a_hundredth_on_shapes_of_a_model():
    block = {"q": (896, 896), "k": (128, 896), "o": (896, 896), "up": (4864, 896), "down": (896, 4864)}
    shapes = {f"{i}.{name}": shape for i in range(4) for name, shape in block.items()}
    for bits in (1.05, 1.1, 1.35, 2.1, 3.1):
        assert 0.99 * bits <= average_bits(shapes, allocate(shapes, bits, random_scores(shapes, 1))) <= bits


def test_budget_with_scores_is_near_the_best_of_all_allocations():
    shapes = {"a": (640, 24), "b": (320, 24), "c": (960, 16)}
    scores = random_scores(shapes, 3)
    options = [[K, k] for K in (1, 2, 3) for k in (0, 8, 16)]
    every = [
        dict(zip(shapes, sizes, strict=True))
        for sizes in itertools.product(options, repeat=3)
        if all(k < shapes[name][1] for name, (_, k) in zip(shapes, sizes, strict=True))
    ]
    for bits in (2.3, 2.7, 3.2, 3.9):
        best = min(loss(sizes, scores) for sizes in every if average_bits(shapes, sizes) <= bits)
        assert loss(allocate(shapes, bits, scores), scores) <= 1.25 * best  # steps of whole bytes are coarse here


def test_budget_goes_to_the_matrix_at_stake():
    shapes = {"loud": (256, 256), "quiet": (256, 256)}
    scores = {"loud": torch.ones(256) * 100, "quiet": torch.ones(256)}
    sizes = allocate(shapes, 2.2, scores)
    assert sizes["loud"][0] > sizes["quiet"][0]
    assert loss(sizes, scores) < loss(allocate(shapes, 2.2), scores)


def test_what_nothing_needs_is_spread_over_matrices_that_no_token_reached():
    shapes = {f"{i}": (64, 256) for i in range(40)}
    scores = {name: torch.ones(256) if i < 4 else torch.zeros(256) for i, name in enumerate(shapes)}
    sizes = allocate(shapes, 2.5, scores)
    bytes_unseen = [stored_bytes(*shapes[name], *sizes[name]) for name in list(shapes)[4:]]
    assert [sizes[name] for name in list(shapes)[:4]] == [[MAX_PLANES, 0]] * 4
    assert max(bytes_unseen) <= 1.2 * min(bytes_unseen)
    assert 0.99 * 2.5 <= average_bits(shapes, sizes) <= 2.5


def test_budget_without_scores_spends_the_same_share_everywhere():
    sizes = allocate(SHAPES, 1.7)
    shares = {name: sizes[name][1] / m for name, (_, m) in SHAPES.items()}
    assert min(shares.values()) > 0
    for name, (_, m) in SHAPES.items():
        assert max(shares.values()) - 8 / m <= shares[name]


@pytest.mark.parametrize("scored", [False, True])
@given(shapes=shape_dicts)
@settings(deadline=None, max_examples=40)
def test_budget_of_exactly_the_floor_is_one_plane(scored, shapes):
    floor = average_bits(shapes, {name: [1, 0] for name in shapes})
    assert floor == pytest.approx(uniform(shapes, 1))
    scores = random_scores(shapes, 2) if scored else None
    assert allocate(shapes, floor, scores) == {name: [1, 0] for name in shapes}


@given(shapes=shape_dicts)
@settings(deadline=None)
def test_budget_below_the_floor_states_a_floor_that_works(shapes):
    floor = average_bits(shapes, {name: [1, 0] for name in shapes})
    below = math.nextafter(floor, 0)
    with pytest.raises(ValueError, match=re.escape(f"got {below}")) as error:
        allocate(shapes, below)
    stated = float(re.search(r"`bits` must be at least ([\d.]+) ", str(error.value))[1])
    assert floor <= stated <= floor + 0.0011
    assert all(K == 1 for K, _ in allocate(shapes, stated).values())
    assert "modules_to_not_convert" in str(error.value)


def test_budget_above_the_ceiling_states_a_ceiling_that_works():
    with pytest.raises(ValueError, match="`bits` must be at most") as error:
        allocate(SHAPES, 20.0)
    stated = float(re.search(r"`bits` must be at most ([\d.]+) ", str(error.value))[1])
    assert 0.98 * stated < average_bits(SHAPES, allocate(SHAPES, stated)) <= stated


@pytest.mark.parametrize(("bits", "planes"), [(1.01, 1), (2.0, 1), (2.02, 2), (3.0, 2), (4.04, 4), (8.0625, 8)])
def test_budget_without_scores_buys_full_planes_first(bits, planes):
    shapes = {"a": (4096, 4096), "b": (4096, 4096)}
    sizes = allocate(shapes, bits)
    assert [K for K, _ in sizes.values()] == [planes, planes]
    assert bits - 0.01 < average_bits(shapes, sizes) <= bits


def test_budget_of_none_is_what_one_plane_and_a_tenth_of_the_columns_take():
    shapes = {"square": (4096, 4096), "wide": (256, 11008), "narrow": (50, 100), "tiny": (50, 16)}
    sizes = allocate(shapes, None)
    assert sizes == {"square": [1, 408], "wide": [1, 1096], "narrow": [1, 8], "tiny": [1, 0]}
    assert average_bits({"square": (4096, 4096)}, {"square": [1, 408]}) == pytest.approx(1.112, abs=1e-3)
    assert average_bits(shapes, allocate(shapes, None, random_scores(shapes, 0))) <= average_bits(shapes, sizes)


def test_average_bits_weighs_matrices_by_their_weights():
    shapes = {name: SHAPES[name] for name in ("q", "odd")}
    total = stored_bytes(96, 64, 1, 16) + stored_bytes(3, 77, 1, 0)
    assert average_bits(shapes, {"q": [1, 16], "odd": [1, 0]}) == pytest.approx(8 * total / (96 * 64 + 3 * 77))
