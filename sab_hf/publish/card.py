"""The model card of a packed checkpoint, written from its summary."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from yaml import YAMLError

from ..units import size_in_words
from .form import picture_format
from .html import TASK_COLUMNS, distillation_lines, evaluation_rows, role_rows, task_rows, tasks_about
from .templating import MARKDOWN
from .verdicts import verdicts

TAGS = ("sab_hf", "binarized", "1-bit", "quantized")
_ON_THE_CARD = ("scores", "bits", "budget", "loss")
"""Pictures that the card shows, by the first word of their names."""


def model_card(
    summary: dict[str, Any],
    repo_id: str = "path/to/this/checkpoint",
    license: str | None = None,
    plots: list[str] | tuple[str, ...] = (),
) -> ModelCard:
    """Write the card of a packed checkpoint.

    Args:
        summary: result of `summary.summarize`, or the JSON report of a checkpoint.
        repo_id: what the loading snippet loads.
        license: identifier of the license for the metadata; None: not stated.
        plots: names of the pictures in the folder `plots` beside the card.
    """
    base = summary["base_model"]
    on_hub = base if base and _is_repo_id(base) else None
    title = repo_id.rpartition("/")[2]
    results = eval_results(summary)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=summary["pipeline_tag"],
        license=license,
        base_model=on_hub,
        base_model_relation="quantized" if on_hub else None,
        tags=list(TAGS),
        model_name=title if results else None,
        eval_results=results or None,
    )
    record, evaluation, tasks = summary["record"] or {}, summary["evaluation"], summary.get("tasks")
    text = MARKDOWN.get_template("model_card.md.jinja").render(
        title=title,
        repo_id=json.dumps(repo_id, ensure_ascii=False),
        base=base,
        on_hub=on_hub,
        bits=f"{summary['bits']:.3f}",
        roles=role_rows(summary),
        total=size_in_words(summary["total_bytes"]),
        at_16_bits=size_in_words(summary["bytes_at_16_bits"]),
        ratio=f"{summary['bytes_at_16_bits'] / summary['total_bytes']:.1f}",
        scores=[name for name in plots if name.split("_")[0] == "scores"],
        plots=[name for name in plots if name.split("_")[0] in _ON_THE_CARD and not name.startswith("scores")],
        verdicts=verdicts(summary),
        evaluation=evaluation,
        evaluation_rows=evaluation_rows(evaluation) if evaluation else None,
        examples=examples(summary),
        tasks=tasks,
        tasks_about=tasks_about(tasks) if tasks else None,
        task_columns=TASK_COLUMNS,
        task_rows=task_rows(tasks) if tasks else None,
        calibration=record.get("calibration"),
        seconds=f"{record['seconds']:,.0f}" if record else None,
        refine_steps=refinement_in_words(summary["config"].get("refine_steps"), record),
        distillations=distillation_lines(record),
        license=license,
        opens=summary.get("opens_with") or {"class": summary["model_class"], "remote_code": False},
        **{
            name: summary[name] for name in ("model_class", "device", "config", "versions", "format_version", "created")
        },
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def refinement_in_words(steps: int | None, record: dict[str, Any]) -> str:
    """Return how many steps of refinement a block had; by default those that are distilled have none."""
    if steps is not None:
        return f"{steps} a block"
    if record.get("distillations"):
        return "none, since blocks were distilled"
    return "400 a block on a GPU, 50 on a CPU (the defaults)"


def eval_results(summary: dict[str, Any]) -> list[EvalResult]:
    """Return what was measured as the `model-index` of the metadata, which the Hub shows beside the card."""
    evaluation, tasks = summary["evaluation"], summary.get("tasks")
    kind = summary["pipeline_tag"] or "other"
    found = []
    for score in tasks["scores"] if tasks else ():
        if score["model"] is not None:
            found.append(_eval_result(kind, score["dataset"], score["task"], score["metric"], score["model"]))
    if evaluation:
        measured = evaluation["model"]["metrics"] | {"nats_per_token": evaluation["model"]["nll"]}
        for metric, value in measured.items():
            if value is not None:
                found.append(_eval_result(kind, evaluation["data"], evaluation["data"], metric, value))
    return found


def _eval_result(kind: str, dataset: str, name: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type=kind,
        dataset_type=dataset or "unknown",
        dataset_name=name or "unknown",
        metric_type=metric or "unknown",
        metric_name=metric.replace("_", " ") or "unknown",
        metric_value=round(value, 6),
    )


def examples(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the examples of an evaluation, each with the name of its picture's file in the folder `plots`, and its bytes."""
    found = (summary["evaluation"] or {}).get("examples") or []
    return [
        example
        | {
            "file": f"example_{i}.{picture_format(example['picture'])}",
            "content": base64.b64decode(example["picture"]),
        }
        for i, example in enumerate(found)
    ]


def find_license(base_model: str | None) -> str | None:
    """Return the license in the card of the original, in a folder or on the Hub; None if there is none to be had."""
    if not base_model:
        return None
    local = Path(base_model) / "README.md"
    if not local.is_file() and (Path(base_model).exists() or not _is_repo_id(base_model)):
        return None
    try:
        card = ModelCard.load(local if local.is_file() else base_model, ignore_metadata_errors=True)
    except (OSError, ValueError, YAMLError, EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError):
        return None
    found = card.data.license
    return found if isinstance(found, (str, list)) else None


def _is_repo_id(name: str) -> bool:
    """Whether `name` has the form owner/name, as the Hub allows it, and is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not Path(name).exists()
