"""Compare accuracy per stored bit: full precision, published methods, packages, and `sab_hf` at several budgets.

    python benchmarks/fidelity.py --model small --jobs 8 --seeds 0 1 2 --output results.json

`--model` is a folder that `examples/tiny_vlm/train.py` wrote. Writes `results.json` and `results.md`; see ACCURACY.md.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples"), str(HERE.parent)]

import tables  # noqa: E402
import torch  # noqa: E402
from methods import OURS, do, floor_bits  # noqa: E402
from packages import PACKAGES  # noqa: E402
from runner import Job, Settings  # noqa: E402
from tables import BITS_STORED, FULL_PRECISION, SECONDS, Column, add_options, add_own_options  # noqa: E402

BASELINE_LABELS = {
    "sign_scale": "sign × scale",
    "gptq_2bit": "GPTQ 2-bit",
    "gptq_3bit": "GPTQ 3-bit",
    "billm": "BiLLM",
    "arb_rc": "ARB-LLM-RC",
    "arb_rc_cgb": "ARB-LLM-RC + CGB",
    "arb_x": "ARB-X",
    "sab_as_published": "SAB-LVLM as published (our reading)",
}
BITS = (1.05, 1.1, 1.2, 1.35, 1.6, 2.1, 3.1)
BITS_OF_OTHER_SEEDS = (1.1, 1.35, 2.1, 3.1)
BITS_OF_REST = (1.1, 2.1)
"""Budgets that also run with towers, projector, embedding and head binarized."""
QUESTION_COLUMNS = (
    BITS_STORED,
    Column("NLL", "nll", ".4g"),
    Column("above full precision", "gap", ".2g"),
    Column("visual %", "visual", ".1f", 100),
    Column("text %", "text", ".1f", 100),
)
COLUMNS = (
    *QUESTION_COLUMNS,
    Column("text perplexity", "text_perplexity", ".4g"),
    Column("same answers %", "agreement", ".1f", 100),
    SECONDS,
)


def list_jobs(floor: float, seeds: Sequence[int], options: dict[str, Any], suffix: str = "") -> list[Job]:
    """Return all rows, the more important first: full precision, then seed after seed.

    floor: least bits/weight of the model; smaller budgets are raised to it, and equal ones merged
    options: fields of `SABQuantizationConfig` for the rows of `sab_hf`; suffix: added to their labels
    """
    budgets, few = (sorted({max(bits, floor) for bits in some}) for some in (BITS, BITS_OF_OTHER_SEEDS))
    jobs = [Job(FULL_PRECISION, FULL_PRECISION)]
    for seed in seeds:
        own = budgets if seed == seeds[0] else few
        jobs += [Job(f"sab_hf {bits:.4g}{suffix}", OURS, seed, bits, dict(options)) for bits in own]
        jobs += [Job(label, method, seed) for method, label in BASELINE_LABELS.items()]
    jobs += [Job(package, package, seeds[0]) for package in PACKAGES]
    for bits in (max(bits, floor) for bits in BITS_OF_REST):
        label = f"sab_hf {bits:.4g}, all else at 4 bits{suffix}"
        jobs.append(Job(label, OURS, seeds[0], bits, {**options, "rest_bits": 4}))
    return jobs


def compare(rows: list[dict]) -> list[dict]:
    """Return the rows with what they differ from full precision by, in place of answers and losses of every question.

    agreement: share of greedy answers equal to full precision's
    gap, gap_error: nats per answer token above full precision, and the standard error of that over the questions, paired
    """
    per_question = "answers", "losses", "tokens"
    reference = next((row for row in rows if row["method"] == FULL_PRECISION and "answers" in row), None)
    result = []
    for row in rows:
        other = {key: value for key, value in row.items() if key not in per_question}
        if "nll" in row and reference is not None:
            other["gap"] = row["nll"] - reference["nll"]
        if "answers" in row and reference is not None:
            same = [a == b for a, b in zip(row["answers"], reference["answers"], strict=True)]
            other["agreement"] = sum(same) / len(same)
            other["gap_error"] = _gap_error(row, reference)
        result.append(other)
    return result


def _gap_error(row: dict, reference: dict) -> float:
    total = sum(row["tokens"])
    differences = [a - b for a, b in zip(row["losses"], reference["losses"], strict=True)]
    gap = sum(differences) / total
    spread = sum((d - gap * n) ** 2 for d, n in zip(differences, row["tokens"], strict=True))
    return math.sqrt(spread) / total


def arguments(description: str) -> argparse.ArgumentParser:
    """Return the options that fidelity and ablation share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a trained model")
    add_options(parser, "results.json")
    add_world_options(parser)
    return parser


def add_world_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of what is drawn from the generated world."""
    parser.add_argument("--questions", type=int, default=2200, help="held-out samples, skills in turn")
    parser.add_argument("--samples", type=int, default=1024, help="calibration samples of the world")
    parser.add_argument("--batch-size", type=int, default=16, help="calibration samples a forward pass")
    parser.add_argument("--eval-batch", type=int, default=128, help="questions a forward pass")


def run(jobs: list[Job], args: argparse.Namespace) -> list[dict]:
    """Run the chosen jobs, full precision among them, and write JSON and table."""
    settings = Settings(
        args.model,
        args.device,
        args.questions,
        args.samples,
        args.batch_size,
        args.eval_batch,
        args.threads,
        max(1, torch.cuda.device_count()),
    )
    return tables.run(jobs, settings, do, args, COLUMNS, compare)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = arguments(__doc__)
    add_own_options(parser)
    args = parser.parse_args(argv)
    run(list_jobs(floor_bits(args.model), args.seeds, args.options, args.name), args)


if __name__ == "__main__":
    main()
