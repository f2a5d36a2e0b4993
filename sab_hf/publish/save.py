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
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoProcessor

from ..anatomy.adapters import refuse_adapters
from .card import find_license, model_card
from .html import html_report, plots
from .inspect import inspect
from .locate import quantization_method
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

    A folder is complete or not there: everything is written beside it and then renamed. A repository gets one commit; if that
    fails, a message says where the checkpoint lies.

    Args:
        model: the packed model.
        processor: its processor (or tokenizer), or a path or Hub id of one; None: from where the model came. It is saved as it
            was loaded, without the padding and truncation that using it has left in it.
        path_or_repo: a folder, or with `push` a Hub repository, "name" or "owner/name".
        push: publish; needs to be logged in (`hf auth login`) or a token.
        record: what `sab_hf.quantize` returned; None: the one that the model carries since it was quantized, if any.
        evaluation: what `sab_hf.evaluate.evaluate` returned, for card and report.
        base_model: Hub id of the original for the card; None: where the model came from, if known.
        license: for the card; None: that in the card of the original.
        max_shard_size: of one weights file.
        private, token, revision, commit_message: of the Hub repository.
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
        told = _report(Path(model.name_or_path))
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
    commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
    logger.info("published %s: %s", repo_id, commit.commit_url)
    return f"{api.endpoint}/{repo_id}"


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the JSON report in the folder of a checkpoint; where there is none, load the model and make one.

    Raises:
        ValueError: the folder holds no packed checkpoint.
    """
    found = inspect(folder)
    summary = _report(folder)
    if summary.get("total_bytes") == found.report.total_bytes:
        return summary
    config = AutoConfig.from_pretrained(folder)
    return summarize(opening_class(config).from_pretrained(folder))


def _report(folder: Path) -> dict[str, Any]:
    """Return the JSON report in a folder; {} if there is none, or another program's."""
    try:
        found = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "total_bytes" in found else {}


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


def check_target(path: str | os.PathLike) -> None:
    """Check that a checkpoint may be written to `path`: it is new, empty, or holds a packed checkpoint.

    Raises:
        ValueError: something else is there, which is not replaced.
        OSError: the folder above cannot be written.
    """
    path = Path(path).absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        config = path / "config.json"
        if not config.is_file():
            raise ValueError(
                f"`{path}` exists and is no checkpoint, so it is not replaced; choose another folder or remove it"
            )
        if quantization_method(json.loads(config.read_text(encoding="utf-8"))) != "sab":
            raise ValueError(
                f"`{path}` holds a checkpoint that sab_hf did not pack, so it is not replaced; choose another folder or remove it"
            )
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OSError(f"`{path}` cannot be made: `{above}` is no folder that can be written")


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Give an empty folder beside `path`, which becomes `path` at the end; on an error it is removed and `path` is as before.

    Raises:
        ValueError, OSError: see `check_target`.
    """
    check_target(path)
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        for file in partial.glob("*.safetensors"):  # written readable for the owner alone
            file.chmod(0o666 & ~_umask())
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent)) / path.name
            path.rename(old)
            try:
                partial.rename(path)
            except BaseException:
                old.rename(path)
                old.parent.rmdir()
                raise
            shutil.rmtree(old.parent)
        else:
            partial.rename(path)
    except SafetensorError as error:  # says neither where, nor that it is the disk's fault
        raise OSError(f"`{path}` could not be written, and nothing was left there: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fresh_processor(model: nn.Module, processor: Any) -> Any:
    """Return the processor as it was loaded: calls of a tokenizer leave padding and truncation in what it saves.

    Raises:
        ValueError: None was given, and there is none where the model came from.
    """
    if processor is None or isinstance(processor, (str, os.PathLike)):
        source = model.config._name_or_path if processor is None else processor
        try:
            return AutoProcessor.from_pretrained(source)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"a checkpoint needs a processor, and none could be loaded from {str(source)!r}; pass the model's processor"
            ) from error
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
        (folder / "plots" / f"{name}.svg").write_text(svg, encoding="utf-8")
    (folder / REPORT).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    (folder / "report.html").write_text(html_report(summary, repo_id.rpartition("/")[2]), encoding="utf-8")
    model_card(summary, repo_id, license, tuple(pictures)).save(folder / "README.md")


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
    write_pages(folder, summary, repo_id, license)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
