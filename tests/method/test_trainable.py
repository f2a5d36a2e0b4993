"""Where the training of planes starts."""

from __future__ import annotations

import pytest
import torch
from helpers import level_problem

from sab_hf.method.fit import PlaneState, from_sign_planes, to_sign_planes
from sab_hf.method.levels import unit_of
from sab_hf.method.trainable import Share, TrainablePlanes


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("share", [Share(0, 1), Share(1, 3), Share(6, 7)])
def test_training_starts_with_the_weights_of_the_planes(planes, share):
    """Each latent lies towards its dense weight, but nearest to its own level, however near another one is."""
    dense, scales = level_problem(30, 40, planes)
    generator = torch.Generator().manual_seed(1)
    B = torch.randint(0, 2, (planes, 30, 40), generator=generator) * 2.0 - 1
    state = PlaneState(B, scales.r, scales.c, scales.c != 0, has_residual=planes > 1)
    if planes == 1:
        state.c[state.c == 0], state.free = 1, torch.ones_like(state.free)
    given = to_sign_planes(state)
    own = share.own(30)
    module = TrainablePlanes(given, dense[own], None, share=share)
    level = from_sign_planes(given).dense()[own]
    torch.testing.assert_close(module.built[own], level, rtol=1e-5, atol=1e-5)
    moved = module.latent * unit_of(*module.scales[:2]) - level
    assert (moved * (dense[own] - level) >= -1e-5).all()
    assert (moved.abs() > 1e-3).sum() >= 0.3 * moved.numel()
