"""Choose rows, run them, and write JSON and a Markdown table after each: what the scripts that compare methods share."""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import runner
import torch
from runner import DONE, Job, Settings, Work, circumstances, done_rows, identity, write_json

FULL_PRECISION = "full precision"
Compare = Callable[[list[dict]], list[dict]]


@dataclass(frozen=True)
class Column:
    """A column of a table: the mean of a measure, and its spread over seeds.

    title: its head; key: of the measure in a row; form: format of a number; factor: that numbers are multiplied by
    """

    title: str
    key: str
    form: str
    factor: float = 1


BITS_STORED = Column("bits", "bits", ".3f")
SECONDS = Column("quantizing s", "quantize_seconds", ".0f")


def markdown(rows: list[dict], columns: Sequence[Column]) -> str:
    """Return the table, mean ± standard deviation over seeds, and the names of what was not run."""
    titles = ["method", *(column.title for column in columns), "seeds"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for label in dict.fromkeys(row["label"] for row in rows):
        done = [row for row in rows if row["label"] == label and row["status"] == DONE]
        if done:
            cells = [spread(done, column.key, column.form, column.factor) for column in columns]
            lines.append(f"| {' | '.join([label, *cells, str(len(done))])} |")
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


def add_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the options of a run of rows. output: the JSON file's default name."""
    parser.add_argument("--output", type=Path, default=Path(output), help="JSON; a table goes beside it")
    parser.add_argument("--rows", "--only", nargs="+", help="run only rows whose label contains one of these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of calibration; spread shows the noise")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="rows side by side, each a process")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a process")
    parser.add_argument(
        "--deadline",
        "--budget",
        type=float,
        default=float("inf"),
        help="seconds; what has not ended then is named",
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows that --output holds, run the others")
    parser.add_argument("--list", action="store_true", help="print the rows that would run, and end")


def add_own_options(parser: argparse.ArgumentParser) -> None:
    """Add what the rows of `sab_hf` are to be made with."""
    parser.add_argument(
        "--options", type=json.loads, default={}, help="JSON: fields of SABQuantizationConfig for sab_hf's rows"
    )
    parser.add_argument(
        "--name", type=", {}".format, default="", help="added to the labels of sab_hf's rows, to tell options apart"
    )


def run(
    jobs: list[Job],
    settings: Settings,
    work: Work,
    args: argparse.Namespace,
    columns: Sequence[Column],
    compare: Compare | None = None,
) -> list[dict]:
    """Run the chosen jobs, write the JSON after each row and the table in the end, and return the rows.

    jobs: all rows, in the order of the table; args: options of `add_options`
    compare: what rows gain by full precision, which then always runs

    Raises:
        SystemExit: no row has such a label.
    """
    chosen = [job for job in jobs if not args.rows or any(part in job.label for part in args.rows)]
    if not chosen:
        raise SystemExit(f"no row has a label with one of {args.rows}; `--list` prints the labels")
    head = circumstances(settings)
    earlier = done_rows(args.output, head) if args.resume and args.output.exists() else {}
    chosen = [job for job in chosen if identity(asdict(job)) not in earlier]
    if compare:
        chosen = [job for job in jobs if job in chosen or job.method == FULL_PRECISION]
    if args.list:
        print("\n".join(f"{job.label} (seed {job.seed})" for job in chosen))
        return []
    places = {identity(asdict(job)): place for place, job in enumerate(jobs)}

    def together(rows: list[dict]) -> list[dict]:
        rows = [*earlier.values(), *rows]
        known = {identity(row): row for row in (compare(rows) if compare else rows)}
        return [known[key] for key in sorted(known, key=lambda key: places.get(key, len(places)))]

    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = together(
        runner.run_jobs(
            chosen,
            settings,
            work,
            num_workers=args.jobs,
            budget=args.deadline,
            report=lambda rows: write_json(args.output, head, together(rows)),
        )
    )
    table = markdown(rows, columns)
    args.output.with_suffix(".md").write_text(table)
    print(table)
    return rows
