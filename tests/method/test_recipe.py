"""The fit of one Linear: what it makes of the factors that Linears with one input share."""

import pytest
import torch
from torch import nn

from sab_hf import SABQuantizationConfig
from sab_hf.method import recipe
from sab_hf.method.hessian import InputFactors, SecondMoments, feedback_factor
from sab_hf.method.sensitivity import LinearSensitivity

CPU = torch.device("cpu")
TEXT, VISUAL = 0, 1


def moments_of(*kinds: int) -> SecondMoments:
    """Second moments of modalities that use the features very differently."""
    moments, generator = SecondMoments(24, CPU), torch.Generator().manual_seed(0)
    for kind in kinds:
        x = torch.randn(200, 24, generator=generator) @ (torch.eye(24) + 0.3 * torch.randn(24, 24, generator=generator))
        moments.add(x * torch.randn(24, generator=generator).mul(1.5).exp(), torch.full((200,), kind))
    return moments


@pytest.mark.parametrize("significance", ["gradient", "paper", "none"])
@pytest.mark.parametrize("kinds", [(TEXT,), (TEXT, VISUAL)])
def test_shared_factors_serve_every_map(monkeypatch, kinds, significance):
    """Whatever Λ a Linear has: U is the feedback factor of its own H, and columns are ranked by the inverse of that H."""
    seen, plain = [], recipe.fit_planes

    def watched(W, H, num_planes, columns, **options):
        seen.append((W, H, columns, options))
        return plain(W, H, num_planes, columns, **options)

    monkeypatch.setattr(recipe, "fit_planes", watched)
    moments = moments_of(*kinds)
    config = SABQuantizationConfig(significance=significance)
    factors = InputFactors(moments, 24, CPU, config.modality_balance, config.damping)
    gradient = {kind: torch.rand(10, generator=torch.Generator().manual_seed(kind)) + 0.1 for kind in kinds}
    at = LinearSensitivity({kind: torch.ones(24) for kind in kinds}, gradient, dict(moments.counts))
    linears = [nn.Linear(24, 10) for _ in range(2)]
    records = [recipe.fit_linear("x", linear, factors, at, [1, 8], config)[1] for linear in linears]
    for (W, H, columns, options), record in zip(seen, records, strict=True):
        torch.testing.assert_close(options["U"], feedback_factor(H), rtol=1e-3, atol=1e-4 * float(options["U"].max()))
        w = 1 if options["row_weight"] is None else options["row_weight"][:, None]
        score = (W.double().square() * w).sum(0) / torch.linalg.inv(H.double()).diagonal()
        assert set(columns.nonzero().flatten().tolist()) == set(score.topk(8).indices.tolist())
        assert 0 < record.error < 1
        assert sum(record.column_share.values()) == pytest.approx(1)
        assert (record.unimodal_share > 0) == (len(kinds) == 2)
    different = not torch.allclose(seen[0][1], seen[1][1], rtol=1e-3)
    assert different == (len(kinds) == 2 and significance != "none")  # Λ depends on the weights
    assert torch.equal(factors.mixed, InputFactors(moments, 24, CPU, "equal", config.damping).mixed)  # left as it was


def test_shares_are_empty_without_significant_columns_or_scores():
    config = SABQuantizationConfig()
    factors = InputFactors(moments_of(TEXT), 24, CPU, "equal", 0.01)
    at = LinearSensitivity({TEXT: torch.ones(24)}, {TEXT: torch.ones(10)}, {TEXT: 200})
    for sensitivity, size in ((at, 0), (None, 8)):
        record = recipe.fit_linear("x", nn.Linear(24, 10), factors, sensitivity, [1, size], config)[1]
        assert record.column_share == {}
