"""Compare accuracy per stored bit: full precision, published methods, packages, and `sab_hf` at several budgets.

    python benchmarks/fidelity.py --model small --jobs 8 --seeds 0 1 2 --output results.json

`--model` is a folder that `examples/tiny_vlm/train.py` wrote. Writes `results.json` and `results.md`; see ACCURACY.md.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples"), str(HERE.parent)]

import torch  # noqa: E402
from methods import FULL_PRECISION, OURS, do, floor_bits  # noqa: E402
from packages import PACKAGES  # noqa: E402
from runner import DONE, Job, Settings, circumstances, done_rows, identity, run_jobs, write_json  # noqa: E402

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
COLUMNS = (
    "method",
    "bits",
    "NLL",
    "above full precision",
    "visual %",
    "text %",
    "text perplexity",
    "same answers %",
    "quantizing s",
    "seeds",
)


def list_jobs(floor: float, seeds: Sequence[int], refine_steps: int = 400) -> list[Job]:
    """Return all rows, the more important first: full precision, then seed after seed.

    floor: least bits/weight of the model; smaller budgets are raised to it, and equal ones merged
    """
    budgets, few = (sorted({max(bits, floor) for bits in some}) for some in (BITS, BITS_OF_OTHER_SEEDS))
    jobs = [Job(FULL_PRECISION, FULL_PRECISION)]
    for seed in seeds:
        jobs += [ours(bits, seed, refine_steps) for bits in (budgets if seed == seeds[0] else few)]
        jobs += [Job(label, method, seed) for method, label in BASELINE_LABELS.items()]
    jobs += [Job(name, name, seeds[0]) for name in PACKAGES]
    jobs += [ours(max(bits, floor), seeds[0], refine_steps, rest_bits=4) for bits in BITS_OF_REST]
    return jobs + [ours(bits, seeds[0], 0) for bits in budgets]


def ours(bits: float, seed: int, refine_steps: int, rest_bits: int | None = None) -> Job:
    """Return the row of `sab_hf` at a budget, with or without refinement, and with all else dense or at `rest_bits` planes."""
    label = f"sab_hf {bits:.4g}" + ("" if refine_steps else ", not refined")
    if rest_bits is None:
        return Job(label, OURS, seed, bits, {"refine_steps": refine_steps})
    options = {"refine_steps": refine_steps, "rest_bits": rest_bits}
    return Job(f"{label}, all else at {rest_bits} bits", OURS, seed, bits, options)


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


def markdown(rows: list[dict]) -> str:
    """Return the table, mean ± standard deviation over seeds, and the names of what was not run."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for label in dict.fromkeys(row["label"] for row in rows):
        done = [row for row in rows if row["label"] == label and row["status"] == DONE]
        if not done:
            continue
        cells = [
            label,
            spread(done, "bits", ".3f"),
            spread(done, "nll", ".4g"),
            spread(done, "gap", ".2g"),
            spread(done, "visual", ".1f", 100),
            spread(done, "text", ".1f", 100),
            spread(done, "text_perplexity", ".4g"),
            spread(done, "agreement", ".1f", 100),
            spread(done, "quantize_seconds", ".0f"),
            str(len(done)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    missing = [row for row in rows if row["status"] != DONE]
    lines += ["", "Not in the table:", ""] if missing else []
    lines += [f"- {row['label']} (seed {row['seed']}): {row['status']}: {row['reason']}" for row in missing]
    return "\n".join(lines) + "\n"


def spread(rows: list[dict], key: str, form: str, factor: float = 1) -> str:
    """Return the mean of a measure over the rows that have it, and its standard deviation where there are several."""
    values = [row[key] * factor for row in rows if row.get(key) is not None]
    if not values:
        return "–"
    text = f"{statistics.fmean(values):{form}}"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{text} ± {deviation:.2g}" if deviation else text


def arguments(description: str) -> argparse.ArgumentParser:
    """Return the options that fidelity and ablation share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--output", type=Path, default=Path("results.json"), help="JSON; a table goes beside it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--questions", type=int, default=2200, help="held-out samples, skills in turn")
    parser.add_argument("--samples", type=int, default=1024, help="calibration samples")
    parser.add_argument("--batch-size", type=int, default=16, help="calibration samples a forward pass")
    parser.add_argument("--eval-batch", type=int, default=128, help="questions a forward pass")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of calibration; spread shows the noise")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a process")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds; what has not ended then is named")
    parser.add_argument("--only", nargs="+", help="run only rows whose label contains one of these, and full precision")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --output holds, run the others")
    parser.add_argument("--list", action="store_true", help="print the rows that would run, and end")
    return parser


def run(jobs: list[Job], args: argparse.Namespace) -> list[dict]:
    """Run the chosen jobs and write JSON and table after each row."""
    wanted = [job for job in jobs if not args.only or any(part in job.label for part in args.only)]
    if not wanted:
        raise SystemExit(f"no row has a label with one of {args.only}; `--list` prints the labels")
    chosen = [
        job for job in jobs if job in wanted or job.method == FULL_PRECISION
    ]  # which the others are compared with
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
    head = circumstances(settings)
    earlier = done_rows(args.output, head) if args.resume and args.output.exists() else {}
    if args.resume:
        chosen = [job for job in chosen if job.method == FULL_PRECISION or identity(asdict(job)) not in earlier]
    if args.list:
        print("\n".join(f"{job.label} (seed {job.seed})" for job in chosen))
        return []

    def together(rows: list[dict]) -> list[dict]:
        known = {identity(row): row for row in compare([*earlier.values(), *rows])}
        return [known[key] for key in (identity(asdict(job)) for job in jobs) if key in known]

    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = together(
        run_jobs(
            chosen,
            settings,
            do,
            num_workers=args.jobs,
            budget=args.budget,
            report=lambda rows: write_json(args.output, head, together(rows)),
        )
    )
    table = markdown(rows)
    args.output.with_suffix(".md").write_text(table)
    print(table)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = arguments(__doc__)
    parser.add_argument("--refine-steps", type=int, default=400, help="of `sab_hf`, a block")
    args = parser.parse_args(argv)
    run(list_jobs(floor_bits(args.model), args.seeds, args.refine_steps), args)


if __name__ == "__main__":
    main()
