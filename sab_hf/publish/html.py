"""A report to look at: one HTML file without anything outside of it, and its pictures as SVG. Markup is in `templates/`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from ..dotted import at_number
from ..units import size_in_words
from . import charts
from .form import picture_format
from .summary import NOT_SHOWN, spent
from .templating import MARKUP
from .verdicts import verdicts

_SECTIONS = (
    ("bits", "Bits by layer", "Stored bits per weight: signs, scales, masks, everything."),
    ("budget", "Where the budget went", "Bytes in the file."),
    ("error", "Error by layer", "Squared error of a layer's output after its fit, relative to the output, under the calibration "
     "data; refinement comes after it."),
    ("significance", "Significance map", "Which input features have a residual plane, and which modality they matter to. Grey: "
     "none has one."),
    ("loss", "Loss by stage", "Squared error of a block's output relative to the full-precision block's, before and after "
     "refinement."),
    ("time", "Time by stage", ""),
)  # fmt: skip
"""First word of the names of pictures, title of their section, text under it."""


def html_report(summary: dict[str, Any], title: str | None = None) -> str:
    """Return the report of a packed model as one HTML page.

    Args:
        summary: result of `summary.summarize`, or the JSON report of a checkpoint.
        title: title of the page; None: one after the original.
    """
    pictures = _model_charts(summary)
    return MARKUP.get_template("report.html.jinja").render(
        title=title or f"{summary['base_model'] or summary['model_class']}, binarized",
        style=Markup(charts.style()),
        hatchings=Markup(charts.hatchings()),
        lead=_lead(summary),
        verdicts=verdicts(summary),
        tasks=_tasks(summary),
        evaluation=_evaluation(summary),
        roles=role_rows(summary),
        sections=[section for prefix, *words in _SECTIONS if (section := _section(pictures, prefix, *words))],
        settings=_settings(summary),
    )


def _section(pictures: dict[str, charts.Chart], prefix: str, title: str, text: str) -> dict[str, Any] | None:
    own = [
        {"title": chart.title, "picture": Markup(chart.svg())}
        for name, chart in pictures.items()
        if name.split("_")[0] == prefix
    ]
    return {"title": title, "text": text, "charts": own} if own else None


def plots(summary: dict[str, Any]) -> dict[str, str]:
    """Return the pictures of a report, file name without ending → SVG; what is not known is left out."""
    return {name: chart.svg(alone=True) for name, chart in (_scores(summary) | _model_charts(summary)).items()}


def role_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return part, binarized weights, bits per weight, packed and dense bytes of each part of a model, in words."""
    return [
        (
            name,
            f"{role['num_quantized']:,}" if role["num_quantized"] else "–",
            "–" if role["bits"] is None else f"{role['bits']:.3f}",
            size_in_words(role["quantized_bytes"]),
            size_in_words(role["dense_bytes"]),
        )
        for name, role in summary["roles"].items()
    ]


def _model_charts(summary: dict[str, Any]) -> dict[str, charts.Chart]:
    found: dict[str, charts.Chart] = {}
    roles = list(dict.fromkeys(module["role"] for module in summary["modules"]))
    for role in roles:
        own = [module for module in summary["modules"] if module["role"] == role]
        found[f"bits_{role}"] = _by_layer(f"Bits per weight, {role}", own, lambda m: m["bits"], "{:.2f}", "blue")
        if any(module["error"] is not None for module in own):
            found[f"error_{role}"] = _by_layer(
                f"Relative output error of the fit, {role}", own, lambda m: m["error"], "{:.3f}", "orange"
            )
    found |= _budget(summary)
    for role in roles:
        found |= _significance(role, [module for module in summary["modules"] if module["role"] == role])
    return found | _stages(summary)


def _lead(summary: dict[str, Any]) -> str:
    seconds = (summary["record"] or {}).get("seconds")
    took = f" in {seconds:,.0f} s on {summary['device']}" if seconds else ""
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return f"{summary['model_class']}, quantized{took}; written {summary['created']} by {versions}"


def _by_layer(
    title: str, modules: list[dict[str, Any]], value: Callable, form: str, scale: str, bounds: Any = None
) -> charts.Chart:
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


def _budget(summary: dict[str, Any]) -> dict[str, charts.Chart]:
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


def _significance(role: str, modules: list[dict[str, Any]]) -> dict[str, charts.Chart]:
    found = {}
    if any(module["num_significant"] for module in modules):
        shown = [module for module in modules if module["num_significant"]]
        wide = max(len(module["significant_columns"]) for module in shown)
        same = [module for module in shown if len(module["significant_columns"]) == wide]
        found[f"significance_columns_{role}"] = _columns(role, same)
        found[f"significance_share_{role}"] = _by_layer(
            f"Share of columns with a residual plane, {role}", modules,
            lambda m: m["num_significant"] / m["in_features"], "{:.2f}", "green",
        )  # fmt: skip
    modalities = sorted({name for module in modules for name in module["column_share"] or {}})
    for modality in modalities if len(modalities) > 1 else []:
        found[f"significance_{modality}_{role}"] = _by_layer(
            f"Share of {modality} in the loss at stake in the significant columns, {role}", modules,
            lambda m, name=modality: (m["column_share"] or {}).get(name), "{:.2f}", "purple", (0.0, 1.0),
        )  # fmt: skip
    if any(module["unimodal_share"] is not None for module in modules):
        found[f"significance_unimodal_{role}"] = _by_layer(
            f"Share of the sensitivity that is unimodal, {role}", modules,
            lambda m: m["unimodal_share"], "{:.2f}", "purple", (0.0, 1.0),
        )  # fmt: skip
    return found


def _columns(role: str, modules: list[dict[str, Any]]) -> charts.Chart:
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
        "green",
        x_label="input features, first to last",
        cell=14,
    )


def _stages(summary: dict[str, Any]) -> dict[str, charts.Chart]:
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


def _scores(summary: dict[str, Any]) -> dict[str, charts.Chart]:
    """Return the pictures of model and original side by side."""
    found = {}
    if summary.get("tasks"):
        scores = summary["tasks"]["scores"]
        series: dict[str, list] = {"model": [score["model"] for score in scores]}
        if any(score.get("original") is not None for score in scores):
            series["original"] = [score.get("original") for score in scores]
        names = [f"{score['task']}: {score['metric'].replace('_', ' ')}" for score in scores]
        found["scores_tasks"] = charts.paired_bars("Scores by task", names, series, "{:.4g}".format)
    evaluation = summary["evaluation"]
    if evaluation and evaluation["model"]["metrics"]:
        metrics = evaluation["model"]["metrics"]
        series = {"model": list(metrics.values())}
        if evaluation.get("original"):
            series["original"] = [evaluation["original"]["metrics"].get(name) for name in metrics]
        names = [name.replace("_", " ") for name in metrics]
        found["scores_answers"] = charts.paired_bars("Answers to questions", names, series, "{:.1%}".format)
    return found


def scores_picture(evaluation: dict[str, Any]) -> str:
    """Return the picture of model and original side by side as SVG.

    Args:
        evaluation: `to_dict()` of what `sab_hf.evaluate.evaluate` or `evaluate_tasks` returned.
    Raises:
        ValueError: it holds no scores: data without answers.
    """
    tasks = "scores" in evaluation
    found = _scores({"tasks": evaluation if tasks else None, "evaluation": None if tasks else evaluation})
    if not found:
        raise ValueError("there is nothing to draw: the data has no answers, so no share of right ones is known")
    return next(iter(found.values())).svg(alone=True)


def _tasks(summary: dict[str, Any]) -> dict[str, Any] | None:
    found = summary.get("tasks")
    if not found:
        return None
    picture = _scores(summary)["scores_tasks"]
    return {
        "about": tasks_about(found),
        "picture": Markup(picture.svg()),
        "head": TASK_COLUMNS,
        "rows": task_rows(found),
    }


TASK_COLUMNS = ("task", "measure", "samples", "model", "original")


def tasks_about(found: dict[str, Any]) -> str:
    """Return what was run, in a sentence."""
    part = "all samples" if found["num_samples"] is None else f"at most {found['num_samples']:,} samples each"
    return f"By {found['harness']}, {part}, seed {found['seed']}, greedy; ± is a standard error."


def task_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the scores of tasks as rows of `TASK_COLUMNS`."""

    def written(score: dict[str, Any], who: str) -> str:
        value, error = score.get(who), score.get(f"{who}_error")
        return "–" if value is None else f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")

    return [
        (
            score["task"],
            score["metric"].replace("_", " ") + ("" if score.get("higher_is_better", True) else " (lower is better)"),
            f"{score['num_samples']:,}",
            written(score, "model"),
            written(score, "original"),
        )
        for score in found["scores"]
    ]


def _evaluation(summary: dict[str, Any]) -> dict[str, Any] | None:
    found = summary["evaluation"]
    if not found:
        return None
    picture = _scores(summary).get("scores_answers")
    return {
        "about": f"{found['num_samples']} samples of {found['data']}, seed {found['seed']}, greedy",
        "picture": Markup(picture.svg()) if picture else "",
        "rows": evaluation_rows(found),
        "examples": [
            {**example, "format": picture_format(example["picture"])} for example in found.get("examples") or []
        ],
    }


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


def _settings(summary: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, str(value)) for name, value in summary["config"].items() if name not in NOT_SHOWN]
    if summary["record"]:
        rows[:0] = [("distillation", line) for line in distillation_lines(summary["record"])]
        rows.insert(0, ("calibration set", summary["record"]["calibration"].removeprefix("calibration set: ")))
    return rows


def distillation_lines(record: dict[str, Any]) -> list[str]:
    """Return how each window of blocks was distilled, in words."""
    return [
        "{steps} steps; loss on held-out samples {before:.4f} before, {after:.4f} after".format(**result)
        for result in record.get("distillations") or []
        if None not in result.values()  # NaN
    ]
