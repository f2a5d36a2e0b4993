"""Products of signs from bfloat16 parts: no less exact than float32."""

import pytest
import torch

from sab_hf.method import products
from sab_hf.method.products import in_three, signs_times


def problem(n: int, m: int, p: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Signs, scales and a matrix whose numbers differ much in size."""
    generator = torch.Generator().manual_seed(n + m + p)
    B = torch.randint(0, 2, (n, m), generator=generator) * 2.0 - 1
    c = torch.randn(m, generator=generator)
    M = torch.randn(m, p, generator=generator) * torch.randn(m, p, generator=generator).mul(3).exp()
    return B.to(device), c.to(device), M.to(device)


def hold_float32(result: torch.Tensor, B: torch.Tensor, c: torch.Tensor, M: torch.Tensor) -> None:
    """Entries are off by some roundings of float32: those of two parts of bfloat16 would be off by 2^-17 of the terms."""
    expected, size = (B * c).double() @ M.double(), c.abs().double() @ M.abs().double()
    assert result.dtype == torch.float32
    assert ((result.double() - expected).abs() <= 2e-6 * size).all()


def test_three_parts_hold_every_bit():
    _, _, M = problem(1, 300, 200)
    M[0, :4] = torch.tensor([0.0, 1 + 2**-23, -(2 - 2**-23), 1e30])
    parts = in_three(M)
    assert [part.dtype for part in parts] == [torch.bfloat16] * 3
    assert torch.equal(sum(part.double() for part in parts), M.double())
    assert not torch.equal(sum(part.double() for part in parts[:2]), M.double())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("depth", [1, 7, 64])
def test_product_from_parts_is_that_of_float32(monkeypatch, depth, transposed):
    B, c, M = problem(9, 23, 5)
    B = B.T.contiguous().T if transposed else B
    plain, made = torch.mm, []

    def with_dtype(a, b, out_dtype):
        made.append((a.dtype, b.dtype, out_dtype))
        return plain(a.to(out_dtype), b.to(out_dtype))

    for name, value in (("LEAST_OPERATIONS", 9 * 23 * 5), ("_DEPTH", depth), ("multiplies_wide", lambda *_: True)):
        monkeypatch.setattr(products, name, value)
    monkeypatch.setattr(torch, "mm", with_dtype)
    given = M.clone()
    hold_float32(signs_times(B, c, M), B, c, M)
    assert set(made) == {(torch.bfloat16, torch.bfloat16, torch.float32)}
    assert len(made) == -(-23 // depth)
    assert torch.equal(M, given)
    made.clear()
    hold_float32(signs_times(B[1:], c, M), B[1:], c, M)  # too small to pay
    assert signs_times(B.double(), c.double(), M.double()).dtype == torch.float64
    assert not made


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "m", "p"), [(33, 300, 70), (700, 5000, 129)])
def test_product_from_parts_is_that_of_float32_on_a_gpu(monkeypatch, n, m, p):
    monkeypatch.setattr(products, "LEAST_OPERATIONS", 0)
    operands = problem(n, m, p, "cuda")
    hold_float32(signs_times(*operands), *operands)
