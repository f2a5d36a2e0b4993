"""Where the time of a token goes on a CPU: products in C, their calls, and everything that is no packed Linear.

The model of `speed_cpu_model.py`, embedding and head packed too, not compiled: by PyTorch, and as recorded steps.

    SAB_CPU_ISA=avx2 python benchmarks/speed_cpu_parts.py --threads 2 --output speed_cpu_parts.json
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from speed_cpu_model import IMAGE_TOKEN, IMAGE_TOKENS, NEW_TOKENS, TEXT_TOKENS, Clock, make_model
from timing import kernels_in_use, provenance, write_json
from torch import nn

from sab_hf import SABLinear, record_decoding
from sab_hf.kernels.cpu import library
from sab_hf.kernels.cpu.steps import KINDS, _Step
from sab_hf.packed.linear import replace_module


class Stub(nn.Module):
    """Returns a tensor of the shape of a Linear's output that is at hand."""

    def __init__(self, out_features: int):
        super().__init__()
        self.out_features, self.outputs = out_features, {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], self.out_features)
        if shape not in self.outputs:
            self.outputs[shape] = torch.randn(shape)
        return self.outputs[shape]


class TimedLibrary:
    """The compiled kernels; adds up the time within products."""

    def __init__(self, kernels):
        self.kernels, self.seconds = kernels, 0.0
        self.by_kind: dict[str, float] = {}

    def __getattr__(self, name: str):
        return getattr(self.kernels, name)

    def sab_cpu_steps(self, steps: int, count: int, threads: int) -> int:
        """Run steps one by one, and add up the time of each kind; they share no crew then."""
        for place in range(count):
            address, start = steps + place * ctypes.sizeof(_Step), time.perf_counter()
            failed = self.kernels.sab_cpu_steps(address, 1, threads)
            step = _Step.from_address(address)
            name = KINDS[step.kind] if KINDS[step.kind] != "packed" else f"packed, {step.size[3]} columns"
            self.by_kind[name] = self.by_kind.get(name, 0.0) + time.perf_counter() - start
            if failed:
                return failed
        return 0

    def sab_cpu_linears(self, *arguments) -> int:
        start = time.perf_counter()
        failed = self.kernels.sab_cpu_linears(*arguments)
        self.seconds += time.perf_counter() - start
        return failed


def spread(times: list[float]) -> dict[str, float]:
    """Minimum and median, milliseconds."""
    return {"min ms": min(times) * 1e3, "median ms": statistics.median(times) * 1e3}


def time_calls(call: Callable[[], object], repeats: int = 21) -> list[float]:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def time_tokens(model: nn.Module) -> tuple[float, list[float]]:
    """Seconds of `generate` and of each further token; the second of two runs."""
    ids = torch.cat([torch.full((1, IMAGE_TOKENS), IMAGE_TOKEN), torch.arange(TEXT_TOKENS)[None] + 100], 1)
    for _ in range(2):
        clock, start = Clock(), time.perf_counter()
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(1, 3, 224, 224), do_sample=False,
            max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0, streamer=clock,
        )  # fmt: skip
        stamps = clock.times[1:]
    return stamps[-1] - start, [later - earlier for earlier, later in pairwise(stamps)]


def time_products(modules: list[SABLinear], inputs: dict[int, torch.Tensor]) -> tuple[list[float], list[float]]:
    """Seconds of a call of every module in turn, and of the C function within, over several rounds."""

    def call_all() -> None:
        for module in modules:
            module(inputs[module.in_features])

    whole = time_calls(call_all)
    load, timed, within = library.load, TimedLibrary(library.load()), []
    library.load = lambda: timed
    for _ in range(len(whole)):
        timed.seconds = 0.0
        call_all()
        within.append(timed.seconds)
    library.load = load
    return whole, within


def time_steps(model: nn.Module, load: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Milliseconds of a recorded token, and of the steps of each kind, one after the other on one thread."""
    record_decoding(model)
    whole, tokens = time_tokens(model)
    rows = {"recorded token": spread(tokens) | {"generate s": whole}}
    timed, threads = TimedLibrary(load()), torch.get_num_threads()
    library.load = lambda: timed
    torch.set_num_threads(1)
    replayed = model.forward.replayed
    time_tokens(model)
    library.load = load
    torch.set_num_threads(threads)
    for kind, seconds in sorted(timed.by_kind.items(), key=lambda item: -item[1]):
        rows[f"steps: {kind}"] = {"mean ms": seconds / (model.forward.replayed - replayed) * 1e3}
    record_decoding(model, enabled=False)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    isa = kernels_in_use()
    model = make_model("packed all, by PyTorch")
    packed = {name: module for name, module in model.named_modules() if isinstance(module, SABLinear)}
    inputs = {module.in_features: torch.randn(1, 1, module.in_features) for module in packed.values()}
    rows = {}
    with torch.inference_mode():
        whole, tokens = time_tokens(model)
        rows["token"] = spread(tokens) | {"generate s": whole}
        for part in ("language", "head", ""):
            modules = [module for name, module in packed.items() if part in name]
            called, within = time_products(modules, inputs)
            rows[f"{len(modules)} {part or 'all'} modules"] = spread(called)
            rows[f"{len(modules)} {part or 'all'} products in C"] = spread(within)
        rows |= time_steps(model, library.load)
        for name, module in packed.items():
            replace_module(model, name, Stub(module.out_features))
        whole, tokens = time_tokens(model)
        rows["token without packed Linears"] = spread(tokens) | {"generate s": whole}
    for name, row in rows.items():
        print(f"{name:32}", {key: round(value, 3) for key, value in row.items()}, flush=True)
    if arguments.output:
        write_json(arguments.output, {"provenance": provenance("cpu") | {"isa": isa}, "rows": rows})


if __name__ == "__main__":
    main()
