"""Look into a packed checkpoint without reading its weights: bits by role, sizes, shapes."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata, hf_hub_download, snapshot_download
from torch import nn

from ..config import SABQuantizationConfig
from ..notebook import html_text
from ..packed.checksums import CONFIG, check_checksums, check_files, files_beside, weights_files
from ..packed.names import is_packed_name
from ..packed.swap import swap_in_empty
from ..packed.verify import check_contents, check_entries, header_entries, naming_stale_files
from ..trust import trusting
from .locate import check_name, not_found, read_config, require_packed
from .open import opening_class
from .report import Report, report

NONE, PRESENT, VERIFIED = "none", "present, not checked", "verified"


@dataclass(frozen=True, repr=False)
class Inspection:
    """What is in a checkpoint; `str()` gives a table, `to_dict()` plain data.

    Attributes:
        name: folder or Hub id.
        format_version: version of the file format.
        num_files, num_tensors: weights files, and tensors in them.
        checksums: NONE, PRESENT or VERIFIED.
        covered: what was verified: the weights, the config, and files beside them; empty unless verified.
        not_covered: files beside them that are in no checksum, such as the card; empty unless verified.
        report: sizes by role and module, from the headers and the config.
    """

    name: str
    format_version: int
    num_files: int
    num_tensors: int
    checksums: str
    report: Report
    covered: tuple[str, ...] = ()
    not_covered: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        names = ("name", "format_version", "num_files", "num_tensors", "checksums", "covered", "not_covered")
        return {name: getattr(self, name) for name in names} | self.report.to_dict()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}: {self.report!r}, checksums: {self.checksums})"

    def _repr_html_(self) -> str:
        return html_text(self._about()) + self.report._repr_html_()

    def __str__(self) -> str:
        return f"{self._about()}\n{self.report}"

    def _about(self) -> str:
        about = (
            f"{self.name}: format version {self.format_version}, {self.report.bits:.3f} bits per binarized weight\n"
            f"{self.num_tensors} tensors in {self.num_files} files, shapes and sums as in the config; checksums: {self.checksums}"
        )
        for text, names in (("verified", self.covered), ("in no checksum", self.not_covered)):
            printed = [name if name.isprintable() else ascii(name) for name in names]
            about += f"\n{text}: {', '.join(printed)}" if names else ""
        return about


def inspect(
    path_or_id: str | os.PathLike,
    *,
    verify: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Inspection:
    """Read the headers of a packed checkpoint and compare them with its config: dtypes, shapes, number of weights.

    Args:
        path_or_id: a folder, or a Hub repository (of which only headers are fetched).
        verify: read everything and check the checksums as well; a repository is downloaded for that.
        revision: revision of the repository.
        trust_remote_code: whether code that the model brings may be run.
    Raises:
        ValueError: the checkpoint is not packed by this package, or is damaged; the message says where.
        OSError: there is no such checkpoint.
    """
    name = str(path_or_id)
    check_name(name)
    folder = Path(path_or_id) if Path(path_or_id).is_dir() else None
    raw = _raw_config(name, folder, revision)
    require_packed(raw, name)
    config = SABQuantizationConfig.from_dict(raw["quantization_config"])
    beside = tuple((config.checksums or {}).get("files", ()))
    if verify and folder is None:
        folder = _download(name, revision, beside)
    model = skeleton(folder or path_or_id, config, revision, trust_remote_code)
    files = weights_files(folder) if folder else []
    if folder and not files:
        raise ValueError(f"`{name}` has no safetensors files; download or quantize it again")
    entries = {file: header_entries(file) for file in files} if folder else _remote_entries(name, revision)
    flat = [entry for of_file in entries.values() for entry in of_file]
    about = name, config.format_version, len(entries), len(flat)
    with naming_stale_files(files):
        check_entries(model, flat)
        _check_sums(model, flat)
        if not verify:
            return Inspection(*about, PRESENT if config.checksums else NONE, report(model))
        check_checksums(files, config.checksums, model)
        if not config.checksums:
            check_contents(files)
            return Inspection(*about, NONE, report(model))
    check_files(folder, config.checksums)
    others = tuple(name for name in files_beside(folder) if name not in beside)
    return Inspection(*about, VERIFIED, report(model), ("weights", CONFIG, *beside), others)


def skeleton(
    path_or_id: str | os.PathLike,
    quantization: SABQuantizationConfig,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Return the packed model of a checkpoint without any weights (on the meta device)."""
    code = trusting(trust_remote_code)
    model = empty_model(read_config(path_or_id, revision=revision, **code), path_or_id, **code)
    with torch.device("meta"):
        swap_in_empty(model, quantization.modules, quantization.tied_head, quantization.tied_embeddings)
    return model


def empty_model(config: Any, path_or_id: str | os.PathLike, **code: bool) -> nn.Module:
    """Return the dense model of a config without any weights (on the meta device).

    Args:
        config, path_or_id: the config, and where it is from.
        code: `trust_remote_code`, for a model that brings its own code.
    Raises:
        ValueError: no model can be built by the config.
    """
    found = opening_class(config)
    make = getattr(found, "_from_config", None) or partial(
        found.from_config, **code
    )  # a model's class, or an auto class
    with torch.device("meta"):
        try:
            return make(config, dtype=config.dtype)
        except (TypeError, AttributeError, KeyError, IndexError, ArithmeticError, RuntimeError) as error:
            raise ValueError(
                f"no model can be built by the config.json of `{path_or_id}` ({type(error).__name__}: {error}); download it or "
                "make it again"
            ) from error


def _download(name: str, revision: str | None, beside: tuple[str, ...]) -> Path:
    """Return the folder into which a repository's weights and configs, and the files called `beside`, were downloaded."""
    wanted = ["*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.safetensors", *beside]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise not_found(name, error) from error


def _raw_config(name: str, folder: Path | None, revision: str | None) -> dict[str, Any]:
    """Return the content of `config.json`."""
    try:
        file = folder / "config.json" if folder else hf_hub_download(name, "config.json", revision=revision)
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise not_found(name, error) from error
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: it is no JSON ({error}); download or quantize it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold an object, got {found!r:.60}; download or quantize it again")
    return found


def _remote_entries(name: str, revision: str | None) -> dict[str, list[tuple[str, str, tuple[int, ...]]]]:
    metadata = get_safetensors_metadata(name, revision=revision)
    return {
        file: [(tensor, info.dtype, tuple(info.shape)) for tensor, info in content.tensors.items()]
        for file, content in metadata.files_metadata.items()
    }


def _check_sums(model: nn.Module, entries: list[tuple[str, str, tuple[int, ...]]]) -> None:
    """Check that the files hold as many dense weights as the model has."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    dense = {
        id(tensor): tensor.numel()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not is_packed_name(name) and name not in ignored
    }
    expected = sum(dense.values())
    found = sum(math.prod(shape) for name, _, shape in entries if not is_packed_name(name))
    if found != expected:
        raise ValueError(
            f"the files hold {found:,} dense weights, the model of the config has {expected:,}; the checkpoint is incomplete or "
            "its config was altered: download or quantize it again"
        )
