"""Save and publish a packed model with everything that belongs to it: weights, processor, card, report, pictures."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import AutoConfig

from ..anatomy.adapters import refuse_adapters
from ..packed.checksums import seal_files
from ..processors import processor_of
from .card import examples, find_license, model_card
from .folders import HIDDEN, atomic_folder, write_file
from .form import check_summary, read_json
from .html import html_report, plots
from .inspect import inspect
from .open import opening_class
from .summary import summarize

logger = logging.getLogger(__name__)

REPORT = "report.json"


def save(
    model: nn.Module,
    processor: Any,
    path_or_repo: str | os.PathLike,
    *,
    push: bool = False,
    record: Any = None,
    evaluation: Any = None,
    base_model: str | None = None,
    license: str | None = None,
    max_shard_size: int | str = "5GB",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a binarized model",
) -> str:
    """Save a packed model with its processor, card, report and pictures to a folder, or publish it as a Hub repository.

    A folder is complete or not there: everything is written to a hidden folder and then renamed. Where a packed checkpoint is
    replaced, other files in its folder stay. A repository gets one commit; if that fails, a message says where the checkpoint
    lies.

    Args:
        model: the packed model.
        processor: its processor (or tokenizer), or a path or Hub id of one; None: from where the model came. It is saved as it
            was loaded, without the padding and truncation that using it has left in it.
        path_or_repo: a folder, or with `push` a Hub repository, "name" or "owner/name".
        push: publish; needs to be logged in (`hf auth login`) or a token.
        record: what `sab_hf.quantize` returned; None: the one that the model carries since it was quantized, if any.
        evaluation: what `sab_hf.evaluate.evaluate` or `evaluate_tasks` returned, for card and report.
        base_model: Hub id of the original for the card; None: where the model came from, if known.
        license: license for the card; None: that in the card of the original.
        max_shard_size: most bytes of one weights file.
        private, token, revision, commit_message: options of the Hub repository.
    Returns:
        The folder, or the URL of the repository.
    Raises:
        ValueError: the model is not packed, carries an adapter, has no processor, or the folder holds something that is no
            packed checkpoint.
    """
    refuse_adapters(
        model,
        "save the adapter with `model.save_pretrained(adapter_folder)`, then the packed model without it with "
        "`sab_hf.save(model.unload(), processor, folder)`",
    )
    summary = summarize(model, record, evaluation, base_model)
    if summary["record"] is None and model.name_or_path:  # loaded packed: what the folder that it came from says
        told = _told(Path(model.name_or_path))
        summary["base_model"] = summary["base_model"] or told.get("base_model")
        if told.get("record"):
            summary |= {name: told[name] for name in ("record", "device")}
    license = license or find_license(model.name_or_path) or find_license(summary["base_model"])
    if summary["base_model"] and Path(summary["base_model"]).exists():
        summary["base_model"] = Path(summary["base_model"]).name  # no path, and nothing that looks like a Hub id
    processor = fresh_processor(model, processor)
    if push:
        folder, repo_id = Path(tempfile.mkdtemp(prefix="sab_hf.")), str(path_or_repo)
        try:
            _write(model, processor, folder, summary, repo_id, license, max_shard_size)
        except BaseException:
            shutil.rmtree(folder)
            raise
        with _kept_unless_published(folder, repo_id):
            if "/" not in repo_id:  # the card names the owner, too
                repo_id = check_login(repo_id, token)
                write_pages(folder, summary, repo_id, license)
            return publish_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
            )
    with atomic_folder(path_or_repo) as folder:
        _write(model, processor, folder, summary, Path(path_or_repo).name, license, max_shard_size)
    return str(path_or_repo)


def publish_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a binarized model",
) -> str:
    """Publish a saved checkpoint as a Hub repository, in one commit, and return its URL. A branch that is not there is made."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision and not revision.startswith("refs/"):  # a pull request is there, or nobody can make it
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message,
        ignore_patterns=[f"{HIDDEN}*"],
    )
    logger.info("published %s: %s", repo_id, commit.commit_url)
    return f"{api.endpoint}/{repo_id}"


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the JSON report in the folder of a checkpoint; where there is none, load the model and make one.

    Raises:
        ValueError: the folder holds no packed checkpoint, or a damaged report.
    """
    found = inspect(folder)
    summary = _report(folder)
    if summary.get("total_bytes") == found.report.total_bytes:
        return summary
    config = AutoConfig.from_pretrained(folder)
    return summarize(opening_class(config).from_pretrained(folder))


def _report(folder: Path) -> dict[str, Any]:
    """Return the JSON report in a folder; {} if there is none, or another program's.

    Raises:
        ValueError: it is damaged.
    """
    file = folder / REPORT
    if not file.is_file():
        return {}
    try:
        found = read_json(file)
        if not isinstance(found, dict) or "total_bytes" not in found:
            return {}
        check_summary(found, file)
    except ValueError as error:
        raise ValueError(
            f"{error}; remove the file; the next run writes it without the record of the quantization"
        ) from error
    return found


def _told(folder: Path) -> dict[str, Any]:
    """Return the JSON report in the folder that a model came from, {} with a warning if it is damaged: saving goes on."""
    try:
        return _report(folder)
    except ValueError as error:
        logger.warning("%s", error)
        return {}


@contextmanager
def _kept_unless_published(folder: Path, repo_id: str) -> Iterator[None]:
    """Remove a saved checkpoint after it was published; if publishing fails or is interrupted, say where it is."""
    try:
        yield
    except BaseException:
        logger.error(
            "the checkpoint was not published; it is complete in %s. Publish it with `sab-hf card %s --push --repo-id %s`",
            folder,
            folder,
            repo_id,
        )
        raise
    shutil.rmtree(folder)


def check_login(repo_id: str, token: str | bool | None = None) -> str:
    """Check that a repository could be published, before work is done for it, and return its id with the owner.

    Raises:
        ValueError: the name is none that a repository may have.
        OSError: not logged in, or the Hub does not answer.
    """
    validate_repo_id(repo_id)
    user = HfApi(token=token).whoami()["name"]
    return repo_id if "/" in repo_id else f"{user}/{repo_id}"


def fresh_processor(model: nn.Module, processor: Any) -> Any:
    """Return the processor as it was loaded: calls of a tokenizer leave padding and truncation in what it saves.

    Raises:
        ValueError: None was given, and there is none where the model came from.
    """
    if processor is None or isinstance(processor, (str, os.PathLike)):
        return processor_of(model, processor, "a checkpoint needs", "pass the model's processor")
    processor = copy.deepcopy(processor)
    tokenizer = getattr(processor, "tokenizer", processor)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return processor


def write_pages(folder: Path, summary: dict[str, Any], repo_id: str, license: str | None = None) -> None:
    """Write card, report and pictures of a checkpoint into its folder."""
    pictures = plots(summary)
    (folder / "plots").mkdir(exist_ok=True)
    for name, svg in pictures.items():
        write_file(folder / "plots" / f"{name}.svg", svg)
    for example in examples(summary):
        write_file(folder / "plots" / example["file"], example["content"])
    write_file(folder / REPORT, json.dumps(summary, indent=1))
    write_file(folder / "report.html", html_report(summary, repo_id.rpartition("/")[2]))
    write_file(folder / "README.md", str(model_card(summary, repo_id, license, tuple(pictures))))


def _write(
    model: nn.Module,
    processor: Any,
    folder: Path,
    summary: dict[str, Any],
    repo_id: str,
    license: str | None,
    max_shard_size: int | str,
) -> None:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)
    seal_files(folder)
    write_pages(folder, summary, repo_id, license)
