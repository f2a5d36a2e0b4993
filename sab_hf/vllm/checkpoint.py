"""A packed checkpoint's folder before vLLM loads it: the checks that `from_pretrained` makes, without a model to compare with."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from ..config import SABQuantizationConfig
from ..packed.checksums import check_checksums, weights_files
from ..packed.verify import PackedSize, check_contents, naming_stale_files, packed_sizes, read_entries

logger = logging.getLogger(__name__)

PATTERNS = ("*.json", "*.safetensors")
"""Files of a repository that the checks read."""


def check_checkpoint(folder: Path, config: SABQuantizationConfig) -> tuple[dict[str, PackedSize], list[str]]:
    """Check headers, checksums and, without checksums, scales and masks of a packed checkpoint.

    Args:
        folder: of the checkpoint.
        config: its quantization config.
    Returns:
        The packed modules, name in the files → sizes; and the names of empty tensors, which are no weights (`checksums.marker`).
    Raises:
        ValueError: a tensor or the config was altered, is missing or is too much; or what vLLM cannot run is packed.
        FileNotFoundError: there are no weights.
    """
    start = time.perf_counter()
    files = weights_files(folder)
    if not files:
        raise FileNotFoundError(f"{folder} has no safetensors files, in which packed weights are; download it again")
    with naming_stale_files(files):
        entries = read_entries(files)
        sizes = packed_sizes(entries)
        _check_listed(sizes, config)
        if config.tied_embeddings:
            raise ValueError(
                f"`{config.tied_embeddings[0]}` of this checkpoint uses the planes of the packed input embedding, which vLLM "
                "cannot with this plugin: quantize with `embedding_bits=16`, or serve it with `python -m sab_hf.run "
                "transformers serve`"
            )
        check_checksums(files, config.checksums)
        if not config.checksums:
            check_contents(files)
    logger.info("checked %d packed matrices in %.1f s", len(sizes), time.perf_counter() - start)
    return sizes, [name for name, _, shape in entries if 0 in shape]


def _check_listed(sizes: dict[str, PackedSize], config: SABQuantizationConfig) -> None:
    """Raise if a config lists other modules than the files hold; their names may differ, what they are sized may not."""
    in_files = sorted([size.num_planes, size.num_significant] for size in sizes.values())
    if not in_files or in_files != sorted(config.modules.values()):
        raise ValueError(
            f"the checkpoint's quantization_config lists {len(config.modules)} packed modules, the files hold {len(in_files)}, "
            "or their planes and significant columns differ; it is incomplete or was altered: download or quantize it again"
        )
