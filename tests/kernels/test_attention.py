"""Attention of few queries: the op, the kernel in Triton's interpreter and on a GPU, and the pass that puts it into graphs."""

import math

import pytest
import torch
from helpers import inputs
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from sab_hf.kernels import attention
from sab_hf.kernels.cuda.linear import attends

# batch, heads, shared heads, queries, tokens, dim
SIZES = {
    "one query": (1, 4, 2, 1, 150, 16),
    "two sequences, some queries": (2, 6, 2, 3, 70, 32),
    "heads of their own": (1, 3, 3, 1, 5, 16),
    "one token": (1, 2, 1, 1, 1, 16),
}
MASKS = ("none", "bool", "float", "nothing seen")


def problem(size, mask: str, dtype=torch.float32, device="cpu"):
    batch, heads, shared, queries, tokens, dim = size
    q = inputs(batch, queries, heads, dim, seed=1, dtype=dtype).transpose(1, 2)  # as projections give it
    k, v = (inputs(batch, shared, tokens, dim, seed=seed, dtype=dtype) for seed in (2, 3))
    seen = torch.rand(batch, 1, queries, tokens, generator=torch.Generator().manual_seed(4)) < 0.3
    seen[..., tokens // 2 :] = False  # the unused part of a cache
    seen[..., 0] = True
    if mask == "nothing seen":
        seen[:, :, -1] = False
    given = {"none": None, "float": torch.where(seen, 0.5, -math.inf).to(dtype)}.get(mask, seen)
    return [None if one is None else one.to(device) for one in (q, k, v, given)]


def dense(q, k, v, mask, scale):
    """PyTorch's attention in float64; zeros where nothing is seen."""
    groups = q.shape[1] // k.shape[1]
    k, v = (one.double().repeat_interleave(groups, 1) for one in (k, v))
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    return scaled_dot_product_attention(q.double(), k, v, attn_mask=mask, scale=scale).nan_to_num(0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_op_attends_as_pytorch_does(size, mask, device):
    given = problem(size, mask, device=device)
    found = attention.sab_attend(*given, 0.3)
    torch.testing.assert_close(found.double(), dense(*given, 0.3), rtol=1e-5, atol=1e-5)
    assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [(1, 3, 9, 16), (1, 2, 9, 8), (2, 2, 9, 16)])
def test_sizes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="heads a multiple of the shared ones, got"):
        attention.sab_attend(torch.ones(1, 4, 1, 16), torch.ones(shape), torch.ones(shape), None, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", [*SIZES.values(), (1, 28, 4, 1, 800, 128), (8, 28, 4, 1, 3000, 128)])
def test_the_kernel_attends_on_a_gpu(size, mask, dtype):
    given = problem(size, mask, dtype, "cuda")
    assert attends(*given[:3])
    found = attention.sab_attend(*given, 0.3)
    torch.testing.assert_close(found.double(), dense(*given, 0.3), rtol=0.02, atol=4 * torch.finfo(dtype).eps)


def nodes(graph, target) -> list:
    return graph.find_nodes(op="call_function", target=target)


def attended(function, *given, suits=lambda *tensors: True):
    """Trace as Inductor does; return the module after the pass, and how many were replaced."""
    module = make_fx(function, select_decomp_table())(*given)
    count = attention.attend(module.graph, suits)
    module.graph.lint()
    module.recompile()
    return module, count


def layer(q, k, v, seen):
    """Attention as models call it: keys and values are repeated for the heads of a token with a mask."""
    groups = q.shape[1] // k.shape[1]
    k, v = (
        one[:, :, None].expand(-1, -1, groups, -1, -1).reshape(q.shape[0], q.shape[1], *one.shape[2:]) for one in (k, v)
    )
    y = scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return y.transpose(1, 2).flatten(2)


def test_the_pass_reads_the_cache_in_place():
    given = problem((2, 6, 2, 1, 70, 16), "bool")
    with torch.no_grad():
        module, count = attended(layer, *given)
        [node] = nodes(module.graph, attention.sab_attend)
        torch.testing.assert_close(module(*given), layer(*given))
    assert count == 1
    assert [one.op for one in node.args[1:4]] == ["placeholder"] * 3  # unrepeated keys and values, and the bool mask


def test_masks_of_numbers_and_heads_of_their_own_stay_what_they_are():
    given = problem((1, 3, 3, 2, 9, 16), "float")
    with torch.no_grad():
        module, count = attended(layer, *given)
        torch.testing.assert_close(module(*given), layer(*given))
    assert count == 1


def test_other_attention_stays():
    q, k, v, _ = problem((1, 2, 2, 3, 9, 16), "none")

    def causal(q, k, v):
        return scaled_dot_product_attention(q, k[:, :, :3], v[:, :, :3], is_causal=True)

    def many(q, k, v):
        return scaled_dot_product_attention(q.repeat(1, 1, 5, 1), k, v)

    with torch.no_grad():
        assert attended(causal, q, k, v)[1] == attended(many, q, k, v)[1] == 0
        assert attended(scaled_dot_product_attention, q, k, v, suits=attends)[1] == 0  # on a CPU
        assert attended(scaled_dot_product_attention, q, k, v)[1] == 1


def cuda_mask(tokens: int):
    """What PyTorch makes of a bool mask on a GPU: numbers, padded to a multiple of 16, and cut again."""

    def make(seen):
        numbers = torch.where(seen, torch.full((), 0.0), torch.full((), -math.inf))
        padded = torch.ops.aten.constant_pad_nd(numbers, [0, -tokens % 16], 0.0)
        return padded[..., :tokens].expand(-1, 3, -1, -1)

    return make


@pytest.mark.parametrize("tokens", [9, 16])
def test_masks_are_found_behind_what_a_gpu_needs(tokens):
    module = make_fx(cuda_mask(tokens))(torch.ones(1, 1, 2, tokens, dtype=torch.bool))
    [seen] = nodes(module.graph, torch.ops.aten.where.self)[0].args[:1]
    [result] = module.graph.find_nodes(op="output")[0].all_input_nodes
    assert attention._unpadded(result) is seen


def test_masks_that_are_cut_keep_their_cut():
    module = make_fx(lambda seen: torch.where(seen, torch.zeros(()), torch.full((), -math.inf))[..., 1:])(
        torch.ones(1, 1, 2, 9, dtype=torch.bool)
    )
    [result] = module.graph.find_nodes(op="output")[0].all_input_nodes
    assert attention._unpadded(result) is result
