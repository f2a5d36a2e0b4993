"""Scores of public tasks by name, through lmms-eval: its data, prompts and scorers, this package's loading and generation.

Every model goes through one adapter, whatever its family, so that model and original get the same inputs. lmms-eval is an extra
(`pip install "sab_hf[tasks]"`) and is imported when a task is run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import gc
import importlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token
from torch import nn
from transformers.utils.logging import tqdm

from ..calibration.chat import ChatEncoder, borrowed
from ..calibration.samples import Sample
from ..config import check_seed
from ..machine.threads import free_threads
from ..publish.report import finite
from .answering import elsewhere, greedy, open_model, training_off

_WHOLE = {"ocrbench": 1000}
"""Tasks that divide their score by the size of the whole data set, whatever part of it was asked."""
_MOST_NEW_TOKENS = 128
"""Of an answer, where a task sets no limit."""


@dataclass(frozen=True)
class TaskScore:
    """One score of one task.

    Attributes:
        task, dataset, metric: names of lmms-eval, and of the data set's repository or folder.
        num_samples: samples that were asked.
        model, original: the scores; None: the task has none to tell, or no original was asked.
        model_error, original_error: standard errors of the scores; None where the task knows none.
        higher_is_better: direction of the score.
    """

    task: str
    dataset: str
    metric: str
    num_samples: int
    model: float | None
    original: float | None = None
    model_error: float | None = None
    original_error: float | None = None
    higher_is_better: bool = True


@dataclass(frozen=True)
class TaskEvaluation:
    """Result of `evaluate_tasks`; `str()` gives a table, `to_dict()` plain data.

    Attributes:
        harness: program and version that asked and scored.
        seed: seed of the choice of samples.
        num_samples: most samples of each task; None: all.
        scores: by task and metric, in the order in which tasks were asked for.
    """

    harness: str
    seed: int
    num_samples: int | None
    scores: list[TaskScore] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(finite(self.to_dict()), indent=2)

    def __str__(self) -> str:
        widths = [max(len(getattr(score, name)) for score in self.scores) for name in ("task", "metric")]
        compared = any(score.original is not None for score in self.scores)
        head = f"{'task':<{widths[0]}}  {'metric':<{widths[1]}}  {'samples':>7}  {'model':>16}"
        lines = [head + (f"  {'original':>16}  {'change':>8}" if compared else "")]
        for score in self.scores:
            line = f"{score.task:<{widths[0]}}  {score.metric:<{widths[1]}}  {score.num_samples:>7}"
            line += f"  {_written(score.model, score.model_error):>16}"
            if compared:
                line += f"  {_written(score.original, score.original_error):>16}"
                if score.model is not None and score.original is not None:
                    line += f"  {score.model - score.original:>+8.4f}"
            lines.append(line)
        return "\n".join([*lines, f"{self.harness}, seed {self.seed}, greedy; ± is a standard error"])


def evaluate_tasks(
    model: nn.Module | str | os.PathLike,
    tasks: Sequence[str],
    processor: Any = None,
    *,
    original: nn.Module | str | os.PathLike | None = None,
    data: str | os.PathLike | None = None,
    include_path: str | os.PathLike | None = None,
    num_samples: int | None = None,
    seed: int = 1,
    batch_size: int = 8,
    max_image_pixels: int | None = None,
    **load_kwargs: Any,
) -> TaskEvaluation:
    """Score a model in tasks of lmms-eval, beside its original. Greedy; one model is in memory at a time if given by name.

    Args:
        model: a generating transformers model, packed or not, or a path or Hub id to load one from.
        tasks: names of tasks, groups or tags of lmms-eval; of a group, tasks that no answer is known for are left out.
        processor: the models' processor; None: from where the model came.
        original: the model to compare with, or a path or Hub id; None: no comparison.
        data: a folder with copies of the data sets' repositories, each under its id (`lmms-lab-encoder/ChartQA`); None: they
            are downloaded.
        include_path: a folder with further tasks, in lmms-eval's YAML.
        num_samples: most samples of each task, chosen at random; None: all.
        seed: seed of that choice.
        batch_size: samples of a forward pass; changes results by rounding only.
        max_image_pixels: larger images are shrunk to this many pixels; None leaves it to the processor.
        load_kwargs: arguments of `from_pretrained`, where a path or id is given.
    Raises:
        ImportError: lmms-eval is not installed.
        ValueError: there is no such task, or it asks for something other than answers to pictures and text.
        FileNotFoundError: a data set is not in `data`.
    """
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    check_seed(seed)
    if include_path is not None and not Path(include_path).is_dir():
        raise FileNotFoundError(f"`include_path` must be a folder with tasks, and there is none at `{include_path}`")
    with _harness() as (lmms_eval, scratch):
        manager = _manager(None if include_path is None else Path(include_path).resolve())
        names = _leaves(manager, tasks)
        for name in names:
            _changes(manager, name, data)  # a data set that is not there shows before a model is opened
        found = []
        for which, kwargs in ((model, load_kwargs), (original, elsewhere(load_kwargs))):
            if which is None:
                continue
            opened, processor = open_model(which, processor, kwargs)
            encoder = ChatEncoder(processor, max_image_pixels)
            if encoder.text_only:
                raise ValueError("tasks ask about pictures, and the model's processor takes none: it is a tokenizer")
            chosen = {name: _load(manager, name, data, num_samples, seed) for name in names}
            with free_threads(opened.device):
                results = _run(lmms_eval, chosen, _adapter(opened, encoder, batch_size), scratch)
            found.append([score for name, task in chosen.items() for score in _of_task(name, task, results, data)])
            if opened is not which:
                del opened
                gc.collect()
    scores = found[0]
    if original is not None:
        before = {(score.task, score.metric): score for score in found[1]}
        pairs = [(score, before[score.task, score.metric]) for score in scores]
        scores = [dataclasses.replace(a, original=b.model, original_error=b.model_error) for a, b in pairs]
    return TaskEvaluation(f"lmms-eval {version('lmms-eval')}", seed, num_samples, scores)


def _written(value: float | None, error: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" + ("" if error is None else f" ±{error:.4f}")


@contextlib.contextmanager
def _harness() -> Iterator[tuple[Any, Path]]:
    """Import lmms-eval, whose prints and log go to stderr, and make a folder for files that tasks write, which is removed."""
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(prefix="sab_hf.") as scratch:
        try:
            package = importlib.import_module("lmms_eval")
            importlib.import_module("lmms_eval.evaluator")
            importlib.import_module("lmms_eval.tasks")
        except ImportError as error:
            raise ImportError(
                f'tasks are run by lmms-eval, which cannot be imported ({error}); install it: pip install "sab_hf[tasks]"'
            ) from error
        yield package, Path(scratch)


@functools.lru_cache(maxsize=4)
def _manager(include_path: Path | None) -> Any:
    """Return the index of tasks, which takes seconds to make."""
    from lmms_eval.tasks import TaskManager

    return TaskManager("WARNING", include_path=None if include_path is None else str(include_path))


def _leaves(manager: Any, names: Sequence[str]) -> list[str]:
    """Return the tasks that the names stand for, without those that no answer is known for if they come with a group.

    Raises:
        ValueError: a name is not known, or stands for no task that can be scored.
    """
    found: dict[str, None] = {}
    for name in names:
        entry = manager.task_index.get(name)
        if entry is None:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"lmms-eval has no task {name!r}{hint}")
        if entry["type"] in ("group", "tag"):
            members = entry["task"] if entry["task"] != -1 else _yaml(entry["yaml_path"])["task"]
            plain = [member if isinstance(member, str) else member["task"] for member in members]
            inner = [leaf for member in plain for leaf in _leaves(manager, [member])]
            scored = [leaf for leaf in inner if _metrics(manager, leaf) != ["submission"]]
            if not scored:
                raise ValueError(f"no answers are known for the tasks of {name!r}: {', '.join(inner)}")
            found |= dict.fromkeys(scored)
        else:
            found[name] = None
    if not found:
        raise ValueError("`tasks` must name at least one task")
    return list(found)


def _yaml(path: str) -> dict[str, Any]:
    from lmms_eval.utils import load_yaml_config

    return load_yaml_config(path, mode="simple")


def _metrics(manager: Any, name: str) -> list[str]:
    config = _yaml(manager.task_index[name]["yaml_path"])
    return [entry["metric"] for entry in config.get("metric_list") or []]


def _changes(manager: Any, name: str, data: Any) -> dict[str, Any]:
    """Return what is changed in a task's config: where its data lies, and that public data needs no login.

    Raises:
        ValueError: the task does not ask for answers.
        FileNotFoundError: its data is not in the folder `data`.
    """
    config = _yaml(manager.task_index[name]["yaml_path"])
    kind = config.get("output_type", "generate_until")
    if kind != "generate_until":
        raise ValueError(f"task {name!r} asks for {kind!r}, and only tasks that ask for answers are run")
    changes: dict[str, Any] = {}
    if config.get("dataset_kwargs"):
        asked = dict(config["dataset_kwargs"])
        if asked.get("token") is True and get_token() is None:
            del asked["token"]  # with it, public data is refused to who has not logged in
        changes["dataset_kwargs"] = asked
    path = config.get("dataset_path")
    if data is not None and path:
        folder = Path(data).resolve() / path
        if not folder.is_dir():
            raise FileNotFoundError(
                f"the data of task {name!r} must lie in `{Path(data) / path}`, and there is no such folder; get it with "
                f"`hf download {path} --repo-type dataset --local-dir {Path(data) / path}`, or leave out the folder"
            )
        changes["dataset_path"] = str(folder)
    return changes


def _load(manager: Any, name: str, data: Any, num_samples: int | None, seed: int) -> Any:
    """Load a task, and leave `num_samples` random samples in the split that is asked.

    Each model has tasks of its own: some add up scores in variables of their modules.
    """
    (task,) = manager.load_config({"task": name, **_changes(manager, name, data)}).values()
    split = task.config.test_split if task.has_test_docs() else task.config.validation_split
    size = len(task.dataset[split])
    if num_samples is not None and num_samples < size:
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
        for dataset in (task.dataset, task.dataset_no_image):
            dataset[split] = dataset[split].select(sorted(order[:num_samples]))
    return task


def _run(lmms_eval: Any, tasks: dict[str, Any], adapter: Any, scratch: Path) -> dict[str, Any]:
    """Return what lmms-eval says of a model in tasks.

    `simple_evaluate` is not used: it changes `filelock` and `ssl` for the whole process.
    """
    for name, task in tasks.items():
        adapter.task_dict[name] = task.dataset
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
    return lmms_eval.evaluator.evaluate(
        lm=adapter,
        task_dict=tasks,
        cli_args=argparse.Namespace(output_path=str(scratch), process_with_media=False),
        log_samples=False,
        process_docs_parallel=1,
    )


def _of_task(name: str, task: Any, found: dict[str, Any], data: Any) -> list[TaskScore]:
    """Return the scores of a task in what lmms-eval returned; those that are no numbers (answers to send in) are left out."""
    results, count = found["results"][name], len(task.eval_docs)
    dataset = task.config.dataset_path
    if data is not None and Path(dataset).is_relative_to(Path(data).resolve()):
        dataset = Path(dataset).relative_to(Path(data).resolve()).as_posix()
    scores = []
    for key, value in results.items():
        metric, _, rest = key.partition(",")
        if not rest or metric.endswith(("_stderr", "_stderr_clt")) or isinstance(value, bool):
            continue
        if not isinstance(value, (int, float)):
            continue
        error = results.get(f"{metric}_stderr,{rest}")
        factor = _WHOLE[name] / count if name in _WHOLE else 1.0
        higher = (found.get("higher_is_better") or {}).get(name, {}).get(metric)
        scores.append(
            TaskScore(
                name,
                dataset,
                metric,
                count,
                float(value) * factor,
                model_error=error * factor if isinstance(error, (int, float)) else None,
                higher_is_better=higher is not False,
            )
        )
    if not scores:
        raise ValueError(f"task {name!r} gives no score, only {sorted(results)}")
    return scores


def _adapter(model: nn.Module, encoder: ChatEncoder, batch_size: int) -> Any:
    """Return the model as lmms-eval takes one."""
    from lmms_eval.api.model import lmms

    class Adapter(lmms):
        is_simple = True  # requests hold the text, and what returns the pictures

        def generate_until(self, requests: list[Any]) -> list[str]:
            found: dict[int, str] = {}
            rows = [(i, *request.args) for i, request in enumerate(requests)]
            with (
                torch.inference_mode(),
                borrowed(encoder.tokenizer),
                training_off(model),
                tqdm(total=len(rows), desc="asking") as bar,
            ):
                for batch in _batches(rows, batch_size if encoder.tokenizer.pad_token else 1):
                    samples, stops, limit = zip(*(self._sample(row) for row in batch), strict=True)
                    for kind in (True, False):  # samples with and without pictures do not mix
                        own = [i for i, sample in enumerate(samples) if bool(sample.num_media) is kind]
                        if own:
                            prompts = encoder(
                                [samples[i] for i in own], padding=len(own) > 1, padding_side="left", reply=True
                            )
                            answers = greedy(model, encoder, prompts, limit[0])
                            for i, answer in zip(own, answers, strict=True):
                                found[batch[i][0]] = _until(answer, stops[i])
                    bar.update(len(batch))
            return [found[i] for i in range(len(rows))]

        def _sample(self, row: tuple) -> tuple[Sample, list[str], int]:
            _, text, wanted, pictures_of, number, task, split = row
            pictures = pictures_of(self.task_dict[task][split][number]) or []
            where = f"task {task}, row {number}"
            for picture in pictures:
                if not hasattr(picture, "convert"):
                    raise ValueError(f"{where}: a picture is required, got {type(picture).__name__}")
            content = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": text}]
            stops = wanted.get("until") or []
            limit = wanted.get("max_new_tokens") or wanted.get("max_gen_toks") or _MOST_NEW_TOKENS
            return (
                Sample([{"role": "user", "content": content}], where),
                [stops] if isinstance(stops, str) else list(stops),
                int(limit),
            )

        def clean(self) -> None:
            """Do nothing: the model is not lmms-eval's to remove, and collecting garbage takes seconds."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise NotImplementedError("only tasks that ask for answers are run")

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError("only tasks that ask for one answer are run")

    return Adapter()


def _batches(rows: list[tuple], batch_size: int) -> Iterator[list[tuple]]:
    """Yield rows that generate in the same way, in batches."""
    kinds: dict[str, list[tuple]] = {}
    for row in rows:
        kinds.setdefault(json.dumps(row[2], sort_keys=True, default=str), []).append(row)
    for group in kinds.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _until(answer: str, stops: list[str]) -> str:
    """Return an answer up to the first of the texts that end it."""
    return re.split("|".join(map(re.escape, stops)), answer, maxsplit=1)[0].strip() if any(stops) else answer
