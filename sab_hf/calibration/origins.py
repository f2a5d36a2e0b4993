"""Where calibration samples come from: the built-in set, the Hub, a folder, a JSONL file, or what the caller holds."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..brief import brief, brief_error
from ..paths import BUILTIN, check_samples
from .pictures import check_regular
from .samples import ACCEPTED_FORMATS, Sample, parse_sample

_SHUFFLE_BUFFER = 1000  # encoded rows of a streamed dataset held while shuffling


def read_samples(calibration: Any, *, seed: int, limit: int, with_images: bool = True) -> Iterator[Sample]:
    """Yield samples in the order of a shuffle that depends only on `seed` and the data.

    The first sample of the data is checked before anything else, so that a wrong format shows at once.

    Args:
        calibration: "builtin", a Hub dataset id, a local folder or JSONL file, or samples in memory.
        seed: seed of the shuffle.
        limit: most samples that will be asked for.
        with_images: False draws only text from the built-in set.

    Raises:
        ValueError: the source does not exist or is empty, or a sample has none of the accepted forms.
        ImportError: the source needs the `datasets` package.
    """
    if is_builtin(calibration):
        return _builtin(seed, limit, with_images)
    if isinstance(calibration, (str, os.PathLike)):
        rows = _open_named(os.fspath(calibration))
    else:
        rows = calibration
        _check_collection(rows)
    return _shuffled(rows, seed, limit)


def is_builtin(calibration: Any) -> bool:
    """Tell whether that names the built-in set."""
    return isinstance(calibration, str) and calibration == BUILTIN


def shuffled_order(count: int, seed: int) -> list[int]:
    """Return the numbers below `count` in an order that depends only on `seed`."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _builtin(seed: int, limit: int, with_images: bool) -> Iterator[Sample]:
    from .builtin import builtin_sample

    for i in range(limit):
        yield parse_sample(builtin_sample(seed, i, with_images=with_images), f"built-in sample {i}")


def _check_collection(rows: Any) -> None:
    if isinstance(rows, Mapping):  # a DatasetDict, one batch, one sample
        raise ValueError(
            f"`calibration` must be a list of samples or of batches, or one split of a dataset, got a "
            f"{type(rows).__name__} with the keys {sorted(map(str, rows))}.\n{ACCEPTED_FORMATS}"
        )
    if not isinstance(rows, Iterable):
        raise ValueError(
            f"`calibration` must be a name, a path or a list of samples, got {brief(rows)}.\n{ACCEPTED_FORMATS}"
        )
    if (
        isinstance(rows, (list, tuple))
        and rows
        and isinstance(rows[0], Mapping)
        and {"role", "content"} <= rows[0].keys()
    ):
        raise ValueError(
            "`calibration` must be a list of samples, got one conversation (its first item has 'role' and 'content'); "
            f"put it into a list.\n{ACCEPTED_FORMATS}"
        )


def _shuffled(rows: Any, seed: int, limit: int) -> Iterator[Sample]:
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        if hasattr(rows, "shuffle"):  # a streamed dataset shuffles its shards and a buffer of undecoded rows
            rows = _checked_stream(rows).shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
            for i, row in enumerate(itertools.islice(rows, limit)):
                yield _as_sample(row, f"sample {i} of the shuffled stream")
            return
        rows = list(itertools.islice(rows, limit))
    if not len(rows):
        raise ValueError("`calibration` must hold at least one sample, got an empty list")
    _as_sample(rows[0], "sample 0")
    for i in shuffled_order(len(rows), seed)[:limit]:
        yield _as_sample(rows[i], f"sample {i}")


def _checked_stream(rows: Any) -> Any:
    first = next(iter(rows), None)
    if first is None:
        raise ValueError("`calibration` must hold at least one sample, got an empty stream")
    _as_sample(first, "sample 0")
    return rows


def _as_sample(row: Any, where: str) -> Sample:
    return row if isinstance(row, Sample) else parse_sample(row, where)


def _open_named(name: str) -> Any:
    check_samples(name)
    path = Path(name).expanduser()
    if os.path.isdir(path):
        return _open_folder(path)
    return _read_jsonl(path) if os.path.isfile(path) else _open_hub(name)


def _open_folder(folder: Path) -> Any:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():  # from `save_to_disk`
        return _one_split(_datasets().load_from_disk(str(folder)))
    files = sorted(folder.glob("*.jsonl"))
    if files:
        return [sample for file in files for sample in _read_jsonl(file)]
    try:
        return _one_split(_datasets().load_dataset(str(folder), streaming=True))
    except OSError as error:
        raise ValueError(
            f"the calibration folder {folder} must hold *.jsonl files, or a dataset that `datasets.load_dataset` "
            f"reads; found neither ({error})"
        ) from error


def _open_hub(name: str) -> Any:
    repository, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        dataset = _datasets().load_dataset(repository, config or None, split=split or None, streaming=True)
    except OSError as error:
        raise ValueError(
            f"cannot load the calibration dataset {repository!r} from the Hub, and no file or folder of that name "
            f"exists ({error}); {BUILTIN!r} needs no network"
        ) from error
    return _one_split(dataset)


def _one_split(dataset: Any) -> Any:
    if isinstance(dataset, Mapping):
        return dataset["train"] if "train" in dataset else next(iter(dataset.values()))
    return dataset


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("calibration from a dataset needs the `datasets` package: pip install datasets") from error
    return datasets


def _read_jsonl(file: Path) -> list[Sample]:
    try:
        check_regular(file)
    except OSError as error:
        raise ValueError(f"the calibration file {file} cannot be read: {error}") from error
    samples = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}, row {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = json.loads(text) if text else None
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where}: the file must be text in UTF-8, and byte {error.start} of this row is not "
                    f"({error.reason}); convert it if it is UTF-16, which Windows calls Unicode"
                ) from error
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{where}: each row must be one JSON value, got {text[:60]!r} ({brief_error(error)})"
                ) from error
            if text:
                samples.append(parse_sample(row, where, file.parent))
    if not samples:
        raise ValueError(f"the calibration file {file} must hold at least one row, got none")
    return samples
