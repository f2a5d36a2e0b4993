"""Draw loss over stored bits from the JSON of `fidelity.py`: how far each method's answers fall behind full precision.

python benchmarks/plot.py results.json --output fidelity.png
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FULL_PRECISION, OURS = "full precision", "sab_hf"
LEAST_GAP = 1e-6  # nats; a gap at or below 0 is drawn here
MARKERS = "svD^<>PXh*dp8H"


def points(rows: list[dict]) -> dict[str, list[tuple[float, float, float, float]]]:
    """Return series name → (bits, mean, least and greatest gap above full precision in nats), by bits."""
    done = [row for row in rows if row["status"] == "done"]
    full = next((row["nll"] for row in done if row["method"] == FULL_PRECISION), None)
    if full is None:
        raise SystemExit("the results hold no full-precision row, above which the gap is measured")
    gaps: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in done:
        if row["method"] != FULL_PRECISION and "rest_bits" not in row["options"]:  # its bits are of the whole model
            gap = max(row["nll"] - full, LEAST_GAP)
            gaps.setdefault((_series(row), row["label"]), []).append((row["bits"], gap))
    series: dict[str, list] = {}
    for (name, _), pairs in gaps.items():
        bits, values = zip(*pairs, strict=True)
        point = statistics.fmean(bits), statistics.fmean(values), min(values), max(values)
        series.setdefault(name, []).append(point)
    return {name: sorted(values) for name, values in series.items()}


def _series(row: dict) -> str:
    if row["method"] != OURS:
        return row["label"]
    return OURS + "".join(row["label"].partition(",")[1:])  # the label has bits before the comma


def draw(rows: list[dict], title: str) -> plt.Figure:
    """Return the figure: bits over gap, both logarithmic, bars from the least to the greatest seed."""
    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
    markers = iter(MARKERS * 2)
    colors = iter(plt.get_cmap("tab20").colors)
    for name, values in points(rows).items():
        bits, mean, low, high = zip(*values, strict=True)
        errors = [[m - a for m, a in zip(mean, low, strict=True)], [b - m for m, b in zip(mean, high, strict=True)]]
        own = name.startswith(OURS)
        refined = name == OURS
        style = {"color": "black" if refined else "0.55", "marker": "o", "zorder": 3} if own else {}
        if not own:
            style = {"color": next(colors), "marker": next(markers)}
        line = ("-" if refined else "--") if own else "none"
        axes.errorbar(bits, mean, yerr=errors, label=name, linestyle=line, markersize=7, capsize=2, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [1, 1.1, 1.25, 1.5, 2, 2.5, 3, 4]
    most = max(bits for values in points(rows).values() for bits, *_ in values)
    axes.set_xlim(0.98, max(3.5, 1.08 * most))
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("stored bits per language weight, everything counted")
    axes.set_ylabel("nats per answer token above full precision")
    axes.grid(True, which="major", alpha=0.3)
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, default=Path("fidelity.png"))
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    machine = results["machine"]["gpu"] or "CPU"
    title = f"{results['settings']['questions']} held-out questions, {machine}, {results['date']}"
    draw(results["rows"], title).savefig(args.output, dpi=150)


if __name__ == "__main__":
    main()
