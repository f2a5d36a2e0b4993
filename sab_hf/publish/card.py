"""The model card of a packed checkpoint, written from its summary."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from yaml import YAMLError

from .html import distillation_lines, evaluation_rows
from .report import size_in_words

TEMPLATE = Path(__file__).with_name("model_card_template.md")
TAGS = ("sab_hf", "binarized", "1-bit", "quantized")
_ON_THE_CARD = ("bits", "budget", "loss")
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
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=summary["pipeline_tag"],
        license=license,
        base_model=on_hub,
        base_model_relation="quantized" if on_hub else None,
        tags=list(TAGS),
    )
    record, evaluation = summary["record"] or {}, summary["evaluation"]
    steps = summary["config"].get("refine_steps")
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        text=as_text,
        code=as_code,
        title=repo_id.rpartition("/")[2],
        repo_id=json.dumps(repo_id, ensure_ascii=False),
        base_sentence=f"This is {_link(summary)}, binarized.",
        bits=f"{summary['bits']:.3f}",
        roles=_role_rows(summary),
        total=size_in_words(summary["total_bytes"]),
        at_16_bits=size_in_words(summary["bytes_at_16_bits"]),
        ratio=f"{summary['bytes_at_16_bits'] / summary['total_bytes']:.1f}",
        plots=[name for name in plots if name.split("_")[0] in _ON_THE_CARD],
        evaluation=evaluation_rows(evaluation) if evaluation else None,
        evaluation_about=_about(evaluation) if evaluation else None,
        calibration=record.get("calibration"),
        seconds=f"{record['seconds']:,.0f}" if record else None,
        refine_steps="400 a block on a GPU, 50 on a CPU (the defaults)" if steps is None else steps,
        distillations=distillation_lines(record),
        license=license,
        opens=summary.get("opens_with") or {"class": summary["model_class"], "remote_code": False},
        **{name: summary[name] for name in ("device", "config", "versions", "format_version", "created")},
    )


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


def as_text(value: Any) -> str:
    """Return a value as text of Markdown, on one line: nothing in it is markup, HTML or the end of a table's cell."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def as_code(value: Any) -> str:
    """Return a value as inline code of Markdown, on one line, delimited by more backticks than it holds."""
    text = " ".join(str(value).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def _link(summary: dict[str, Any]) -> str:
    base = summary["base_model"]
    if base and _is_repo_id(base):
        return f"[{as_code(base)}](https://huggingface.co/{base})"
    return f"a {as_code(summary['model_class'])}"


def _role_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            f"{role['num_quantized']:,}",
            "–" if role["bits"] is None else f"{role['bits']:.3f}",
            size_in_words(role["quantized_bytes"]),
            size_in_words(role["dense_bytes"]),
        )
        for name, role in summary["roles"].items()
    ]


def _about(evaluation: dict[str, Any]) -> str:
    return (
        f"{evaluation['num_samples']} samples of {as_code(evaluation['data'])}, seed {evaluation['seed']}, greedy; "
        "`sab-hf eval` repeats it."
    )
