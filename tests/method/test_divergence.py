"""The divergence of next-token distributions and its gradient, held to autograd in float64."""

import pytest
import torch

from sab_hf.method.divergence import divergence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_are_those_of_autograd(dtype):
    given, wanted = (4 * torch.randn(2, 3, 50, dtype=dtype) for _ in range(2))
    counted = torch.tensor([[1.0, 0.0, 0.5], [1.0, 1.0, 1.0]])
    leaf = given.double().requires_grad_(True)
    p, log_q = wanted.double().softmax(-1), leaf.log_softmax(-1)
    expected = ((p * (p.log() - log_q)).sum(-1) * counted).sum()
    expected.backward()
    value, gradient = divergence(given, wanted.clone(), counted)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)
