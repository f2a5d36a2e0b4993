"""A report to look at: one HTML file without anything outside of it, and its pictures as SVG."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from html import escape
from typing import Any

from ..dotted import at_number
from . import charts
from .report import size_in_words
from .summary import NOT_SHOWN, spent

_STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; color: #222; background: #f6f7f8;
       margin: 0; }
main { max-width: 900px; margin: 0 auto; padding: 28px 24px 60px; background: #fff; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 36px 0 6px; border-top: 1px solid #ddd; padding-top: 18px; }
p.lead { color: #555; margin: 0 0 18px; }
figure { margin: 14px 0; overflow-x: auto; }
table { border-collapse: collapse; margin: 10px 0; }
td, th { padding: 3px 14px 3px 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #ccc; font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.figures { display: flex; flex-wrap: wrap; gap: 12px; }
.figures div { background: #f1f5f9; border-radius: 6px; padding: 10px 16px; }
.figures b { display: block; font-size: 21px; }
"""


def html_report(summary: dict[str, Any], title: str | None = None) -> str:
    """Return the report of a packed model as one HTML page.

    Args:
        summary: result of `summary.summarize`, or the JSON report of a checkpoint.
        title: title of the page; None: one after the original.
    """
    title = title or f"{summary['base_model'] or summary['model_class']}, binarized"
    pictures = plots(summary)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p class='lead'>{escape(_lead(summary))}</p>",
        _figures(summary),
        "<h2>Parts of the model</h2>",
        role_table(summary),
        *_section("Bits by layer", pictures, "bits", "Stored bits per weight: signs, scales, masks, everything."),
        *_section("Where the budget went", pictures, "budget", "Bytes in the file."),
        *_section("Error by layer", pictures, "error", "Squared error of a layer's output after its fit, relative to "
                  "the output, under the calibration data; refinement comes after it."),
        *_section("Significance map", pictures, "significance", "Which input features have a residual plane, and which "
                  "modality they matter to. Grey: none has one."),
        *_section("Loss by stage", pictures, "loss", "Squared error of a block's output relative to the "
                  "full-precision block's, before and after refinement."),
        *_section("Time by stage", pictures, "time", ""),
        *_evaluation(summary),
        "<h2>Settings</h2>",
        _settings(summary),
    ]  # fmt: skip
    return (
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>\n"
        f"<style>{_STYLE}</style></head>\n<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def plots(summary: dict[str, Any]) -> dict[str, str]:
    """Return the pictures of a report, file name without ending → SVG; what is not known is left out."""
    found: dict[str, str] = {}
    roles = list(dict.fromkeys(module["role"] for module in summary["modules"]))
    for role in roles:
        own = [module for module in summary["modules"] if module["role"] == role]
        found[f"bits_{role}"] = _by_layer(f"Bits per weight, {role}", own, lambda m: m["bits"], "{:.2f}", charts.BLUES)
        if any(module["error"] is not None for module in own):
            found[f"error_{role}"] = _by_layer(
                f"Relative output error of the fit, {role}", own, lambda m: m["error"], "{:.3f}", charts.ORANGES
            )
    found |= _budget(summary)
    for role in roles:
        found |= _significance(role, [module for module in summary["modules"] if module["role"] == role])
    return found | _stages(summary)


def role_table(summary: dict[str, Any]) -> str:
    """Return the table of roles in HTML."""
    rows = [
        (
            name,
            f"{role['num_quantized']:,}" if role["num_quantized"] else "–",
            "–" if role["bits"] is None else f"{role['bits']:.3f}",
            size_in_words(role["quantized_bytes"]),
            size_in_words(role["dense_bytes"]),
        )
        for name, role in summary["roles"].items()
    ]
    return _table(("part", "binarized weights", "bits per weight", "packed", "dense"), rows, numbers=True)


def _lead(summary: dict[str, Any]) -> str:
    seconds = (summary["record"] or {}).get("seconds")
    took = f" in {seconds:,.0f} s on {summary['device']}" if seconds else ""
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return f"{summary['model_class']}, quantized{took}; written {summary['created']} by {versions}"


def _figures(summary: dict[str, Any]) -> str:
    whole = summary["bytes_at_16_bits"]
    figures = [
        (f"{summary['bits']:.3f}", "bits per binarized weight"),
        (size_in_words(summary["total_bytes"]), "whole checkpoint"),
        (size_in_words(whole), "the same model with 16-bit weights"),
        (f"{whole / summary['total_bytes']:.1f}×", "smaller"),
    ]
    return "<div class='figures'>" + "".join(f"<div><b>{a}</b>{b}</div>" for a, b in figures) + "</div>"


def _section(title: str, pictures: dict[str, str], prefix: str, text: str) -> list[str]:
    own = [svg for name, svg in pictures.items() if name.split("_")[0] == prefix]
    if not own:
        return []
    return [f"<h2>{title}</h2>", f"<p>{text}</p>", *(f"<figure>{svg}</figure>" for svg in own)]


def _by_layer(
    title: str, modules: list[dict[str, Any]], value: Callable, form: str, scale: Any, bounds: Any = None
) -> str:
    """Draw a heat map with a row for each kind of layer and a column for each block; alike layers of a block are averaged."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(list)
    rows, columns = {}, {}
    for module, (block, kind) in zip(modules, _places(modules), strict=True):
        rows[kind] = columns[block] = None
        if value(module) is not None:
            sums[kind, block].append(value(module))
    table = [
        [sum(sums[row, column]) / len(sums[row, column]) if sums[row, column] else None for column in columns]
        for row in rows
    ]
    return charts.heat_map(title, list(rows), list(columns), table, form.format, scale, bounds)


def _places(modules: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return block number and kind of each module; with the list of blocks if there are several, as of encoder and decoder."""
    split = [_split(module["name"]) for module in modules]
    several = len({blocks for blocks, _, _ in split if blocks}) > 1
    return [(number, ".".join(filter(None, (blocks, kind))) if several else kind) for blocks, number, kind in split]


def _split(name: str) -> tuple[str, str, str]:
    """Split the name of a module into list of blocks, number and kind: further numbers, those of experts, are left out."""
    split = at_number(name)
    if split is None:
        return "", "–", name.rpartition(".")[2]
    blocks, number, kind = split
    return blocks, number, re.sub(r"\.\d+(?=\.|$)", "", kind)


def _budget(summary: dict[str, Any]) -> dict[str, str]:
    by_role = spent(summary)
    kinds = list(dict.fromkeys(kind for sizes in by_role.values() for kind in sizes))
    quantized = charts.stacked_bars(
        "Packed bytes by kind",
        list(by_role),
        {kind: [sizes.get(kind, 0) for sizes in by_role.values()] for kind in kinds},
        size_in_words,
    )
    roles = summary["roles"]
    parts = {
        "packed": [role["quantized_bytes"] for role in roles.values()],
        "left dense": [role["dense_bytes"] for role in roles.values()],
    }
    whole = charts.stacked_bars("Whole checkpoint by part", list(roles), parts, size_in_words)
    return {"budget_kinds": quantized, "budget_parts": whole}


def _significance(role: str, modules: list[dict[str, Any]]) -> dict[str, str]:
    found = {}
    if any(module["num_significant"] for module in modules):
        shown = [module for module in modules if module["num_significant"]]
        wide = max(len(module["significant_columns"]) for module in shown)
        same = [module for module in shown if len(module["significant_columns"]) == wide]
        found[f"significance_columns_{role}"] = _columns(role, same)
        found[f"significance_share_{role}"] = _by_layer(
            f"Share of columns with a residual plane, {role}", modules,
            lambda m: m["num_significant"] / m["in_features"], "{:.2f}", charts.GREENS,
        )  # fmt: skip
    modalities = sorted({name for module in modules for name in module["column_share"] or {}})
    for modality in modalities if len(modalities) > 1 else []:
        found[f"significance_{modality}_{role}"] = _by_layer(
            f"Share of {modality} in the loss at stake in the significant columns, {role}", modules,
            lambda m, name=modality: (m["column_share"] or {}).get(name), "{:.2f}", charts.PURPLES, (0.0, 1.0),
        )  # fmt: skip
    if any(module["unimodal_share"] is not None for module in modules):
        found[f"significance_unimodal_{role}"] = _by_layer(
            f"Share of the sensitivity that is unimodal, {role}", modules,
            lambda m: m["unimodal_share"], "{:.2f}", charts.PURPLES, (0.0, 1.0),
        )  # fmt: skip
    return found


def _columns(role: str, modules: list[dict[str, Any]]) -> str:
    """Draw where in its input features each layer has significant columns, from the first feature to the last."""
    shown = modules[:200]
    labels = [" ".join(place) for place in _places(shown)]
    count = len(shown[0]["significant_columns"])
    return charts.heat_map(
        f"Where the significant columns lie, {role}",
        labels,
        [f"{4 * i // count * 25}%" if i % max(1, count // 4) == 0 else "" for i in range(count)],
        [module["significant_columns"] for module in shown],
        "{:.0%}".format,
        charts.GREENS,
        x_label="input features, first to last",
        cell=(max(6, 620 // count), 14),
    )


def _stages(summary: dict[str, Any]) -> dict[str, str]:
    record, found = summary["record"], {}
    if record and record["refinements"]:
        blocks = [str(i) for i in range(len(record["refinements"]))]
        series = {
            name: [result[i] for result in record["refinements"]]
            for i, name in enumerate(("after the fit", "after refinement"))
        }
        found["loss_by_stage"] = charts.lines(
            "Error of a block's output", blocks, series, "block", "relative squared error"
        )
    if record and record["stages"]:
        seconds = {name: stage["seconds"] for name, stage in record["stages"].items()}
        found["time_by_stage"] = charts.stacked_bars(
            "Time by stage", list(seconds), {"seconds": list(seconds.values())}, "{:,.1f} s".format
        )
    return found


def _evaluation(summary: dict[str, Any]) -> list[str]:
    evaluation = summary["evaluation"]
    if not evaluation:
        return []
    rows = evaluation_rows(evaluation)
    about = f"{evaluation['num_samples']} samples of {evaluation['data']}, seed {evaluation['seed']}"
    return ["<h2>Evaluation</h2>", f"<p>{escape(about)}</p>", _table(("", "model", "original"), rows, numbers=True)]


def evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return what an evaluation measured as rows: measure, model, original."""
    model, original = evaluation["model"], evaluation.get("original") or {}

    def written(value: float | None, form: str) -> str:
        return "–" if value is None else form.format(value)

    rows = [
        (name.replace("_", " "), written(value, "{:.1%}"), written((original.get("metrics") or {}).get(name), "{:.1%}"))
        for name, value in model["metrics"].items()
    ]
    rows.append(("nats per token", written(model["nll"], "{:.4f}"), written(original.get("nll"), "{:.4f}")))
    for key, name, form in (
        ("answer_agreement", "same answer as the original", "{:.1%}"),
        ("token_agreement", "same likeliest token", "{:.1%}"),
        ("kl", "KL to the original, nats", "{:.4f}"),
    ):
        if evaluation.get(key) is not None:
            rows.append((name, form.format(evaluation[key]), "–"))
    return rows


def _settings(summary: dict[str, Any]) -> str:
    rows = [(name, str(value)) for name, value in summary["config"].items() if name not in NOT_SHOWN]
    if summary["record"]:
        rows[:0] = [("distillation", line) for line in distillation_lines(summary["record"])]
        rows.insert(0, ("calibration set", summary["record"]["calibration"].removeprefix("calibration set: ")))
    return _table(("setting", "value"), rows)


def distillation_lines(record: dict[str, Any]) -> list[str]:
    """Return how each window of blocks was distilled, in words."""
    return [
        "{steps} steps; loss on held-out samples {before:.4f} before, {after:.4f} after".format(**result)
        for result in record.get("distillations") or []
        if None not in result.values()  # NaN
    ]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], numbers: bool = False) -> str:
    def cells(tag: str, row: tuple[str, ...]) -> str:
        return "".join(
            f"<{tag}{' class=number' if numbers and i else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(row)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', head)}</tr>\n{body}</table>"
