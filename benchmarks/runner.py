"""Run independent jobs in several processes on one device, within a time budget, and write every row when it is done."""

import json
import multiprocessing as mp
import os
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

DONE, FAILED, NOT_RUN = "done", "failed", "not run"
PACKAGES = ("torch", "transformers", "sab_hf", "hqq", "auto-round", "optimum-quanto", "gptqmodel")


@dataclass(frozen=True)
class Job:
    """One row of a result.

    label: names the row; jobs that differ in their seed alone share it
    method: "full precision", "sab_hf", a key of `baselines.BASELINES`, or a key of `packages.PACKAGES`
    seed: of the calibration samples and of what the method draws
    bits: stored bits/weight asked for; only "sab_hf" takes it
    options: fields of `SABQuantizationConfig`, beside those that every job sets
    samples: calibration samples; None for the run's number
    """

    label: str
    method: str
    seed: int = 0
    bits: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    samples: int | None = None


@dataclass(frozen=True)
class Settings:
    """What all jobs of a run share.

    model: folder of the trained model; device: "cuda" or "cpu"
    questions: held-out samples; samples: calibration samples; batch_size: of calibration; eval_batch: of evaluation
    threads: CPU threads of a job; gpus: GPUs that the jobs are spread over
    """

    model: str
    device: str
    questions: int
    samples: int
    batch_size: int
    eval_batch: int
    threads: int
    gpus: int = 1


Work = Callable[[Job, Settings], dict[str, Any]]
Report = Callable[[list[dict[str, Any]]], None]


class NotRunError(Exception):
    """A job cannot run here; the message is the reason that the result names."""


def run_jobs(
    jobs: list[Job], settings: Settings, work: Work, *, num_workers: int, budget: float, report: Report
) -> list:
    """Run `jobs` in their order, `num_workers` at a time, and return their rows in the same order.

    work: importable function from a job to its measures; it runs in a spawned process
    budget: seconds; jobs that have not ended by then are stopped, and named as not run
    report: called with all rows after each that ends
    """
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # spawned processes read it before they import torch
    deadline, context = time.monotonic() + budget, mp.get_context("spawn")
    rows = [_row(job, NOT_RUN, reason="the time budget ended before it") for job in jobs]
    waiting, running = list(enumerate(jobs)), {}
    idle = [_start(context, work, settings, i) for i in range(min(num_workers, len(jobs)))]
    workers = list(idle)
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while idle and waiting:
                index, job = waiting.pop(0)
                worker = idle.pop()
                worker[1].send(job)
                running[worker[1]] = index, worker
            for connection in wait(list(running), timeout=min(60.0, max(0.0, deadline - time.monotonic()))):
                index, worker = running.pop(connection)
                try:
                    rows[index] = connection.recv()
                except EOFError:
                    worker[0].join()
                    rows[index] = _row(jobs[index], FAILED, reason=f"its process ended with {worker[0].exitcode}")
                    worker = _start(context, work, settings, workers.index(worker))
                    workers.append(worker)
                idle.append(worker)
                _print(rows[index])
                report(rows)
    finally:
        for process, connection in workers:
            process.terminate()
            connection.close()
    for index, _ in running.values():
        rows[index] = _row(jobs[index], NOT_RUN, reason="stopped at the end of the time budget")
    report(rows)
    return rows


def _start(context: Any, work: Work, settings: Settings, number: int) -> tuple[mp.Process, Connection]:
    """Start worker `number`; GPUs are dealt out in turn."""
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work, settings), daemon=True)
    with _one_gpu(number, settings.gpus):
        process.start()
    theirs.close()
    return process, ours


@contextmanager
def _one_gpu(number: int, gpus: int) -> Iterator[None]:
    """Let a process that is started here see one of `gpus` GPUs only."""
    name, before = "CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus > 1:
        os.environ[name] = visible_gpus(gpus)[number % gpus]
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def visible_gpus(count: int) -> list[str]:
    """Return what names each of the first `count` GPUs that are visible here in `CUDA_VISIBLE_DEVICES`."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ([str(number) for number in range(count)] if given is None else given.split(","))[:count]


def _serve(connection: Connection, work: Work, settings: Settings) -> None:
    """Do jobs as they come, each measured alone, until the connection closes."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(settings.threads)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(do_job(job, settings, work))


def do_job(job: Job, settings: Settings, work: Work) -> dict[str, Any]:
    """Do one job in this process and return its row, whatever happens."""
    import torch

    cuda = settings.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        row = _row(job, DONE, **work(job, settings))
    except NotRunError as error:
        return _row(job, NOT_RUN, reason=str(error))
    except Exception as error:  # a row that fails must not end the run; its reason is in the result
        traceback.print_exc()
        return _row(job, FAILED, reason=f"{type(error).__name__}: {error}"[:500])
    row["date"] = date.today().isoformat()
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20) if cuda else None
    return row


def _row(job: Job, status: str, **values: Any) -> dict[str, Any]:
    plain = asdict(job)
    return plain | {"bits_asked": plain.pop("bits"), "status": status} | values


def _print(row: dict[str, Any]) -> None:
    name = f"{row['label']} (seed {row['seed']})"
    if row["status"] != DONE:
        print(f"{name}: {row['status']}: {row['reason']}", flush=True)
        return
    forms = {"nll": "NLL {:.4g}", "visual": "visual {:.1%}", "text": "text {:.1%}", "perplexity": "perplexity {:.4g}"}
    measures = [form.format(row[key]) for key, form in forms.items() if key in row]
    measures = [f"{row['bits']:.3f} bits", *measures, f"{row['seconds']:.0f} s"]
    print(f"{name}: {', '.join(measures)}", flush=True)


def circumstances(settings: Settings) -> dict[str, Any]:
    """Return what a reader needs to repeat a run: command, date, machine, versions, settings."""
    import torch

    cuda = settings.device == "cuda"
    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *(_short(word) for word in sys.argv[1:])]),
        "date": date.today().isoformat(),
        "machine": {
            "gpu": torch.cuda.get_device_name() if cuda else None,
            "cpu": platform.machine(),
            "cpu_cores": os.cpu_count(),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        # folders of this machine mean nothing elsewhere
        "settings": {k: Path(v).name if k in ("model", "text") else v for k, v in asdict(settings).items()},
    }


def _short(word: str) -> str:
    return Path(word).name if os.path.isabs(word) else word


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        if package == "sab_hf":  # run from a clone
            return __import__(package).__version__
        return None


def identity(row: dict[str, Any]) -> str:
    """Return what tells the row of one job, or the job as a dict, from all others."""
    bits = row["bits_asked"] if "bits_asked" in row else row["bits"]
    return json.dumps([row["label"], row["method"], row["seed"], bits, row["options"], row["samples"]], sort_keys=True)


def done_rows(path: Path, head: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return identity → row of what an earlier run has done, each with the date of its run.

    Raises:
        SystemExit: it was run with other settings or on another GPU.
    """
    earlier = json.loads(path.read_text())
    for what, old, new in (
        ("settings", earlier["settings"], head["settings"]),
        ("GPU", earlier["machine"]["gpu"], head["machine"]["gpu"]),
    ):
        old, new = (
            {k: v for k, v in x.items() if k not in ("gpus", "threads")} if isinstance(x, dict) else x
            for x in (old, new)
        )
        if old != new:
            raise SystemExit(f"{path} was made with other {what}: {old}, now {new}; choose another --output")
    rows = [row for row in earlier["rows"] if row["status"] == DONE]
    return {identity(row): {"date": earlier["date"]} | row for row in rows}


def write_json(path: Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write a run's circumstances and rows; by way of another file, so that a stopped run leaves a whole one."""
    other = path.with_suffix(".tmp")
    other.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
    other.replace(path)
