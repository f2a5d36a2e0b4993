"""Checksums of a packed checkpoint: written when it is saved, checked when it is loaded, dense tensors and config included.

`quantization_config.checksums` in `config.json` holds

- `tensors`: for each block of the model (file names up to their first number) and for each module outside of blocks, a digest
  of the names, dtypes, shapes and bytes of its tensors, as they are in the files;
- `aliases`: names of tied tensors → the name under which they are counted (a file holds one of them);
- `config`: a digest of `config.json` as parsed JSON, without itself and without what tools rewrite;
- `files`, if `sab_hf.save` wrote the folder: for each file beside weights and config that a model needs (of its processor,
  tokenizer, chat template, generation config, own code) a digest of its bytes. Loading does not read those files; `sab-hf
  inspect --verify` checks them.

A digest is BLAKE2b, 8 bytes in hexadecimal. It finds damage; it is no signature.

A packed checkpoint also holds one empty tensor under the name of a dense weight (`marker`). Without the plugin, transformers
would only warn and initialize the packed modules randomly; with a weight of the wrong shape in the file it raises.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..dotted import block_of
from .names import names_when_saved, settle_names, tail, tied

logger = logging.getLogger(__name__)

_REWRITTEN = ("transformers_version", "auto_map", "custom_pipelines")
"""Keys of `config.json` that other tools write and that change no weight."""
_LARGE = 2**20
"""Bytes from which a tensor is worth a thread."""
_HINT = (
    "download or quantize it again. If the change is meant, set `checksums` in the quantization_config of config.json to null; "
    "tensors and config are not compared with what was saved then"
)
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def seal(model: nn.Module) -> dict[str, Tensor] | None:
    """Write the checksums of `model` into its quantization config, for `save_pretrained` to save.

    Args:
        model: a quantized transformers model that is about to be saved.
    Returns:
        The state dict to save, which holds the marker; None where transformers must make it (offloaded tensors).
    Raises:
        ValueError: transformers would not load it again from the names under which it saves it.
    """
    config = model.config.quantization_config
    config.checksums = None
    state = model.state_dict()
    empty, mark = torch.empty(0, dtype=torch.uint8), marker(config.modules)
    offloaded = [name for name, tensor in state.items() if tensor.is_meta]
    if offloaded:
        metas = {name: tensor.to("meta") for name, tensor in (state | {mark: empty}).items()}
        settle_names(model, metas, config.modules, mark)
        logger.warning(
            "%d tensors are offloaded, first `%s`: the checkpoint is saved without checksums; load the model with "
            "device_map='cpu' to save them",
            len(offloaded),
            offloaded[0],
        )
        return None
    state[mark] = empty
    stored = settle_names(model, state, config.modules, mark)
    aliases = tied({name: stored[name] for name in sorted(stored)})
    digests = _digest_all((name, tensor) for name, tensor in stored.items() if name not in aliases)
    config.checksums = {"tensors": _by_group(digests), "aliases": aliases, "config": ""}
    config.checksums["config"] = config_digest(_config_to_be_saved(model))
    return state


def marker(modules: Iterable[str]) -> str:
    """Return the name of the empty tensor that makes loading without the plugin an error.

    It belongs to a module of a block that is no expert, if there is one: transformers converts the weights of experts and ties
    those of embeddings.
    """

    def rank(name: str) -> tuple[bool, int, str]:
        numbers = sum(part.isdigit() for part in name.split("."))
        return numbers == 0, numbers, name

    return f"{min(modules, key=rank)}.weight"


def expect_marker(model: nn.Module, modules: Iterable[str]) -> None:
    """Let transformers not report the marker as a tensor that the model has no place for."""
    ending = re.escape(tail(marker(modules)))
    ignored = model._keys_to_ignore_on_load_unexpected
    kind = set if isinstance(ignored, set) else list  # transformers 5, 4.57
    model._keys_to_ignore_on_load_unexpected = kind([*(ignored or ()), rf"(^|\.){ending}$"])


def seal_files(folder: Path) -> None:
    """Add the files beside the weights to the checksums in the config of a checkpoint that was just saved.

    Args:
        folder: holds what `save_pretrained` of model and processor wrote, and nothing else.
    """
    path = folder / CONFIG
    content = json.loads(path.read_text(encoding="utf-8"))
    checksums = content["quantization_config"]["checksums"]
    if checksums is not None:
        checksums["files"] = {name: _hash((folder / name).read_bytes()) for name in files_beside(folder)}
        checksums["config"] = config_digest(content)
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def files_beside(folder: Path) -> list[str]:
    """Return the files of a folder that are neither weights, nor `config.json`, nor hidden, as paths from it, sorted."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
    weights = re.compile(r"\.safetensors$|\.safetensors\.index\b.*\.json$")
    return sorted(name for name in names if name != CONFIG and not weights.search(name))


def check_files(folder: Path, checksums: dict[str, Any]) -> None:
    """Compare the files beside the weights with the checksums in the config.

    Raises:
        ValueError: a file was altered or is missing.
    """
    for name, expected in checksums.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing, which was saved with the checkpoint: {_HINT}")
        if _hash(path.read_bytes()) != expected:
            raise ValueError(f"{path} was altered after it was saved: {_HINT}")


def files_being_loaded() -> list[str]:
    """Return the weights files that a `from_pretrained` further up the stack is about to load; [] if there are none.

    transformers 5 hands them to quantizers. transformers 4.57 does not: there they are a local variable, the only place that
    knows what `subfolder`, `variant` and `revision` led to.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "from_pretrained" and "checkpoint_files" in frame.f_locals:
            return list(frame.f_locals["checkpoint_files"] or ())
        frame = frame.f_back
    return []


def weights_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint's folder, which loaders take by default; [] if there are none.

    Raises:
        ValueError: the index of a sharded checkpoint is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    return [folder / name for name in sorted(set(read_index(folder / INDEX).values()))]


def read_index(path: Path) -> dict[str, str]:
    """Return the file of each tensor, as the index of a sharded checkpoint tells.

    Raises:
        ValueError: it has another form.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        right = isinstance(found, dict) and all(
            isinstance(name, str) and Path(name).name == name for name in found.values()
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); download or quantize the checkpoint again") from error
    if not right:
        raise ValueError(
            f"{path} must map tensors to files beside it under `weight_map`; download or quantize it again"
        )
    return found


def check_checksums(
    files: Iterable[str | os.PathLike], checksums: dict[str, Any] | None, model: nn.Module | None = None
) -> None:
    """Compare a checkpoint with the checksums in its config; without checksums (an older or edited checkpoint) warn.

    Args:
        files: its safetensors files, those that are loaded; `config.json` lies beside them.
        checksums: `quantization_config.checksums`.
        model: the skeleton; with it, files are accepted that were saved under the names of the model's own tensors
            (`save_pretrained(save_original_format=False)` of transformers 5).
    Raises:
        ValueError: a tensor or the config was altered, is missing or is too much, or it is not known what is loaded.
    """
    files = [Path(file) for file in files]
    if not checksums:
        logger.warning(
            "the packed checkpoint has no checksums: altered signs, dense weights and configs are not noticed, only what has a "
            "wrong size, and scales and masks that cannot be. `save_pretrained` writes checksums"
        )
        return
    if not files:
        raise ValueError(
            "the packed checkpoint has checksums, and the files that it is loaded from are not known, so they cannot be checked: "
            "load it from its folder or repository (not from a state dict), or set `checksums` in its quantization_config to None"
        )
    config = files[0].parent / CONFIG
    if config.is_file() and config_digest(json.loads(config.read_text(encoding="utf-8"))) != checksums["config"]:
        raise ValueError(f"{config} was altered after it was saved: {_HINT}")
    tensors: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as reader:
            names = list(reader.keys())
            where |= dict.fromkeys(names, file.name)
            tensors |= {name: reader.get_tensor(name) for name in names}  # mapped, not read
    _check_index(files[0].parent, where)
    wrong = _differing(tensors, checksums)
    names = {name for name, tensor in tensors.items() if tensor.numel()}  # the marker is in no model
    if wrong and model is not None and names <= model.state_dict().keys():
        mark = next((name for name, tensor in tensors.items() if not tensor.numel()), "")
        own = [_differing(names_when_saved(model, tensors, mark, prefixes), checksums) for prefixes in (False, True)]
        wrong = min(own, key=len)
    if wrong:
        raise ValueError(
            f"tensors of the checkpoint in {files[0].parent} were altered, lost or added after it was saved: checksums differ "
            f"for {len(wrong)} of {len(checksums['tensors'])} parts, first `{wrong[0]}`; {_HINT}"
        )


def _differing(tensors: dict[str, Tensor], checksums: dict[str, Any]) -> list[str]:
    """Return the parts whose digest is not the recorded one."""
    found = _digest_all((checksums["aliases"].get(name, name), tensor) for name, tensor in tensors.items())
    groups, expected = _by_group(found), checksums["tensors"]
    return sorted(name for name in groups.keys() | expected.keys() if groups.get(name) != expected.get(name))


def _check_index(folder: Path, where: dict[str, str]) -> None:
    """Raise if the index of a sharded checkpoint does not list its tensors: loaders leave out what it does not list."""
    shards = set(where.values())
    if len(shards) < 2:
        return
    indices = {
        path: read_index(path) for path in sorted(folder.glob("*.safetensors.index*.json"))
    }  # one for each variant
    for index, listed in indices.items():
        wrong = sorted(name for name in listed.keys() | where.keys() if listed.get(name) != where.get(name))
        if wrong and set(listed.values()) & shards:
            raise ValueError(
                f"{index} and the files beside it differ in {len(wrong)} tensors, first `{wrong[0]}`; {_HINT}"
            )


def config_digest(config: dict[str, Any]) -> str:
    """Return the digest of a parsed `config.json`, without its own checksum and what other tools rewrite."""
    config = {key: value for key, value in config.items() if key not in _REWRITTEN}
    method = dict(config.get("quantization_config") or {})
    if isinstance(method.get("checksums"), dict):
        method["checksums"] = {key: value for key, value in method["checksums"].items() if key != "config"}
    return _hash(json.dumps(config | {"quantization_config": method}, sort_keys=True).encode())


def _config_to_be_saved(model: nn.Module) -> dict[str, Any]:
    """Return `config.json` as `save_pretrained` will write it in a moment."""
    config = copy.deepcopy(model.config)
    config.quantization_config = model.config.quantization_config
    config.dtype = str(model.dtype).split(".")[1]
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    if hasattr(config, "_get_non_default_generation_parameters") and model.can_generate():  # transformers 4.57
        for name in config._get_non_default_generation_parameters():
            setattr(config, name, None)
    vars(config).pop("transformers_weights", None)
    return json.loads(config.to_json_string(use_diff=True))


def _digest_all(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return name → digest of dtype, shape and bytes; large tensors in threads, since hashing releases the interpreter."""
    digests: dict[str, Any] = {}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for name, tensor in tensors:
            digests[name] = pool.submit(_digest, tensor) if tensor.nbytes > _LARGE else _digest(tensor)
        return {name: value if isinstance(value, str) else value.result() for name, value in digests.items()}


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _hash(f"{tensor.dtype} {list(tensor.shape)} ".encode(), content)


def _by_group(digests: Mapping[str, str]) -> dict[str, str]:
    """Return one digest for each block, and for each module outside of blocks."""
    lines: dict[str, list[str]] = defaultdict(list)
    for name in sorted(digests):
        lines[part_of(name)].append(f"{name} {digests[name]}\n")
    return {group: _hash("".join(lines[group]).encode()) for group in sorted(lines)}


def part_of(name: str) -> str:
    """Return the part of a checkpoint that a tensor's digest goes into: its block, or its module outside of blocks."""
    return block_of(name) or name.rpartition(".")[0]


def _hash(*contents: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for content in contents:
        digest.update(content)
    return digest.hexdigest()
