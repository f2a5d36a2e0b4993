"""What the GPU kernels lose by rounding activations: the share of an output's energy, with channels that stand out."""

import argparse

import torch
from speed_gpu import random_operands
from timing import provenance, write_json

from sab_hf.kernels.cuda import launch as kernels
from sab_hf.kernels.cuda.planes import planes as collect

SHAPE = (4096, 3584)
KERNELS = ("single", "bits", "int8", "dot")


def losses(planes, W: torch.Tensor, count: int, times: float) -> dict[str, float]:
    """Return ‖y - x Wᵀ‖² / ‖x Wᵀ‖² of each kernel for a Gaussian input with `count` channels `times` as large.

    Args:
        W: [out_features, in_features] float64, the dense matrix of `planes`.
    """
    x = torch.randn(1, W.shape[1], device="cuda")
    x[:, torch.randperm(W.shape[1], device="cuda")[:count]] *= times
    x = x.bfloat16()
    exact = x.double() @ W.T
    row: dict[str, float] = {"outliers": count, "times": times}
    for name in KERNELS:
        product = getattr(kernels, f"{name}_product")
        for suffix, inputs in (("", x.float()), (" bf16", x)):  # the same inputs; bf16 outputs are rounded once more
            error = product(inputs, planes).double() - exact
            row[name + suffix] = (error.norm() / exact.norm()).item() ** 2
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="rounding_gpu.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    planes = collect(*random_operands(*SHAPE, 1, 0))
    W = kernels.unpack(planes, torch.float32, 0, SHAPE[0]).double()
    rows = [losses(planes, W, count, times) for times in (100, 1000) for count in (0, 1, 4, 32, 128, 400)]
    write_json(options.output, provenance("cuda") | {"shape": SHAPE, "rows": rows})


if __name__ == "__main__":
    main()
