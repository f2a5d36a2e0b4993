"""Designs of the portable mode, held against each other and against our own format.

    python benchmarks/portable.py smollm2 --text ../shared/real --jobs 4 --output portable.json
    python benchmarks/portable.py examples/tiny_vlm/checkpoint --group 128 --output portable_tiny.json

`smollm2` is what `real_lm.py build` makes; a model without `--text` is one that `examples/tiny_vlm/train.py` wrote, asked about
its generated world. "row scales alone" is `portable="gguf"`. Rows of smollm2 have 576 and 1,536 weights, and Q1_0 takes multiples
of 128: that rule is waived here, and only here. Bits are those of Q1_0, one float16 scale for 128 weights; "scales by group" has
groups of `--group` weights, a width that divides all rows.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples"), str(HERE.parent)]

import fidelity  # noqa: E402
import methods  # noqa: E402
import real_lm  # noqa: E402
import tables  # noqa: E402
from methods import OURS, floor_bits  # noqa: E402
from runner import Job  # noqa: E402
from tables import FULL_PRECISION  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import sab_hf  # noqa: E402
from sab_hf.anatomy.llama_cpp import GROUP  # noqa: E402
from sab_hf.anatomy.roles import find_roles  # noqa: E402
from sab_hf.anatomy.selection import language_linears  # noqa: E402
from sab_hf.make import plan  # noqa: E402
from sab_hf.packed.linear import replace_module  # noqa: E402

OWN, ROWS, GROUPS = DESIGNS = ("our own format", "row scales alone", "scales by group")
Q1_0_BITS = 1 + 16 / GROUP


@dataclass(frozen=True)
class DesignSettings(real_lm.TextSettings):
    """Settings of a language model, or without `text` of one of the generated world.

    group: weights of a row that share a scale, where scales go by group
    """

    group: int = GROUP


class GroupedLinear(nn.Module):
    """A Linear as the sum of Linears of `group` columns each, which get row scales of their own."""

    def __init__(self, linear: nn.Linear, group: int):
        super().__init__()
        self.group, self.count = group, linear.in_features // group
        for i, weight in enumerate(linear.weight.detach().split(group, 1)):
            part = nn.Linear(group, linear.out_features, bias=False, device="meta")
            part.weight = nn.Parameter(weight.clone())
            self.add_module(f"part{i}", part)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.group, -1)
        y = sum(getattr(self, f"part{i}")(parts[i]) for i in range(self.count))
        return y if self.bias is None else y + self.bias


def take_apart(model: nn.Module, group: int) -> None:
    """Replace the language Linears of a model by sums of Linears of `group` columns each, in place."""
    for name, linear in language_linears(model, find_roles(model), []).items():
        if linear.in_features % group:
            raise ValueError(f"`--group` must divide {linear.in_features}, the columns of `{name}`, got {group}")
        replace_module(model, name, GroupedLinear(linear, group))


@contextmanager
def design(name: str, group: int) -> Iterator[None]:
    """Have `sab_hf.quantize` make models of a design for a while, of rows of any width."""
    quantize = sab_hf.quantize

    def apart(model: nn.Module, *args: Any) -> Any:
        take_apart(model, group)
        return quantize(model, *args)

    with ExitStack() as stack:
        stack.enter_context(patch.object(plan, "check_rows", lambda shapes: None))
        if name == GROUPS:
            stack.enter_context(patch.object(sab_hf, "quantize", apart, create=True))
        yield


def do(job: Job, settings: DesignSettings) -> dict[str, Any]:
    """Return the measures of one job, whose method is a design; see `real_lm.do`, and without a text `methods.do`."""
    work = real_lm.do if settings.text else methods.do
    if job.method == FULL_PRECISION:
        return work(job, settings)
    with design(job.method, settings.group):
        row = work(replace(job, method=OURS), settings)
    if job.method != OWN:
        row["bits"] = 1 + 16 / settings.group if job.method == GROUPS else Q1_0_BITS
    return row


def list_jobs(floor: float, seeds: Sequence[int], options: dict[str, Any]) -> list[Job]:
    """Return all rows: full precision, then seed after seed.

    floor: least bits/weight of our own format for the model; options: fields of `SABQuantizationConfig` for all other rows
    """
    jobs = [Job(FULL_PRECISION, FULL_PRECISION)]
    for seed in seeds:
        budgets = dict.fromkeys((floor, max(floor, Q1_0_BITS)))
        jobs += [Job(f"{OWN}, {bits:.4g} bits", OWN, seed, bits, dict(options)) for bits in budgets]
        jobs += [Job(name, name, seed, None, {"portable": "gguf"} | options) for name in DESIGNS[1:]]
    return jobs


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--text", default="", help="folder of the WikiText-2 files; without it, the generated world")
    tables.add_options(parser, "portable.json")
    fidelity.add_world_options(parser)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: fields of SABQuantizationConfig")
    parser.add_argument("--group", type=int, default=96, help="weights that share a scale; divides all rows")
    parser.add_argument("--windows", type=int, default=96, help="stretches of 1,024 tokens that are measured")
    parser.set_defaults(samples=None, batch_size=8, eval_batch=8)
    return parser


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Run the script."""
    args = arguments().parse_args(argv)
    of_text = {"questions": len(real_lm.PROMPTS), "samples": args.samples or 0}  # 0: the whole text
    more = of_text if args.text else {"samples": args.samples or 512}
    jobs = list_jobs(floor_bits(args.model), args.seeds, args.options)
    columns, compare = (real_lm.COLUMNS, None) if args.text else (fidelity.COLUMNS, fidelity.compare)
    return tables.run(jobs, real_lm.settings_of(args, DesignSettings, **more), do, args, columns, compare)


if __name__ == "__main__":
    main()
