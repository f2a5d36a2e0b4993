"""Distillation on one and on several GPUs of one host: time, and the peak of memory on each.

    python benchmarks/several_gpus.py --gpus 1 2 --output benchmarks/results/several_gpus.json
    python benchmarks/several_gpus.py --gpus 2 --cases smollm2 --model smollm2 --text ../shared/real

Cases: "7b" and "7b lent" are all 28 blocks of the 7B shape, 200 steps of 8 samples; the second as on GPUs with 64 GiB free,
where two lend each other weights. "72b" is two blocks of the 72B shape, 20 steps, as on GPUs with 16 GiB free, so in windows of
one block. "smollm2" is SmolLM2-135M with real weights, 400 steps, and its perplexity (a folder that `real_lm.py build` has made).
Weights of shapes are random, so their blocks are fitted in the quickest way; times and memory are those of real ones.

Each case runs on each number of GPUs, the largest number first, cases of one GPU beside each other. On one H200 "7b" took 187 s
and "72b" 35 s, building the model not included. Rows are written as they come. Runs on several GPUs, one after the other, have
equal parts of the time until `--deadline`. One that does not end in its part is ended, and the end of its logs is printed.

Each run leaves its logs beside `--output`, written as it goes: `NAME.CASE.GPUS.log` is that of the launcher, and
`NAME.CASE.GPUS.RANK.log` that of a process, with the time since it began. A process that is ended writes there where each of its
threads was.

Without GPUs, processes compute on the CPU: `--cases tiny` tries the script.
"""

from __future__ import annotations

import argparse
import faulthandler
import glob
import json
import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from threading import Lock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import real_lm  # noqa: E402
import shapes  # noqa: E402
import timing  # noqa: E402
import torch  # noqa: E402
from runner import visible_gpus  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import sab_hf  # noqa: E402
from sab_hf.machine import distributed, rates  # noqa: E402
from sab_hf.make import distil  # noqa: E402

logger = logging.getLogger("sab_hf.several_gpus")
GIB = 2**30
KEY = ("case", "gpus")
LAST_LINES = 30
"""Lines of each log that are printed of a run that has no row."""
WAIT = 120
"""Seconds that a process waits for the others before it says what it waits for."""
PATIENCE = 20
"""Seconds in which a run that is told to end has to."""


@dataclass(frozen=True)
class Case:
    """One thing to distil.

    shape: of `shapes.SHAPES`, or "" for the model with real weights; layers: blocks of it
    steps: of distillation; samples: of calibration, 0 for a whole text; batch_size, distil_batch: of the config
    free_gib: memory of a GPU that may be used, None for what is free
    """

    shape: str
    layers: int
    steps: int
    samples: int
    batch_size: int
    distil_batch: int
    free_gib: float | None = None


CASES = {
    "7b": Case("7b", 28, 200, 64, 4, 8),
    "7b lent": Case("7b", 28, 200, 64, 4, 8, free_gib=64),
    "72b": Case("72b", 2, 20, 32, 2, 4, free_gib=16),
    "smollm2": Case("", 30, 400, 0, 4, 16),
    "tiny": Case("tiny", 2, 4, 8, 1, 4),
}


def work(name: str, args: argparse.Namespace) -> None:
    """Do a case as one of its processes; the first one writes the row."""
    case, cuda = CASES[name], torch.cuda.is_available()
    log_to(args.output.with_suffix(f".{os.environ.get('RANK', 0)}.log"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    logger.info("%s on %s, torch %s", name, device, torch.__version__)
    if case.free_gib is not None:
        distil.free_memory = rates.free_memory = lambda _: case.free_gib * GIB
    dtype = torch.bfloat16 if cuda else torch.float32
    tokenizer, settings = None, None
    if case.shape:
        model = shapes.build(shapes.SHAPES[case.shape], case.layers, device, dtype)
        given = shapes.batches(model, shapes.SHAPES[case.shape], case.samples, case.batch_size)
        options = {"fit": "elementwise", "alternations": 1}
    else:
        sizes = {"samples": case.samples, "batch_size": case.batch_size, "eval_batch": 8, "questions": 0, "threads": 2}
        settings = real_lm.TextSettings(args.model, device.type, **sizes, text=args.text)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        given = real_lm.calibration_batches(tokenizer, settings, case.samples, 0)
        options = {"bits": 1.1}
    if cuda:
        torch.cuda.empty_cache()
    logger.info("the model and %d batches are there", len(given))
    config = sab_hf.SABQuantizationConfig(
        num_samples=sum(len(batch["input_ids"]) for batch in given),
        batch_size=case.batch_size,
        distil_batch=case.distil_batch,
        distil_steps=case.steps,
        significance="none" if case.shape else "gradient",
        budget="uniform",
        compute_device=str(device),
        process_timeout=WAIT,
        **options,
    )
    record = sab_hf.quantize(model, None, given, config)
    stage = record.stages.stages["distillation"]
    peaks = distributed.merge({distributed.rank(): (stage.peak_gpu_mib or 0.0) / 1024})
    if distributed.rank() > 0:
        return
    row = {
        "case": name,
        "gpus": args.process_of,
        **asdict(case),
        "seconds": record.seconds,
        "distillation_seconds": stage.seconds,
        "ms_a_step": 1e3 * stage.seconds / sum(result.steps for result in record.distillations),
        "peak_gib_of_each": [peaks[rank] for rank in sorted(peaks)],
        "predicted_gib": (record.predicted.memory()["distillation"][0]) / GIB,
        "predicted_seconds": record.predicted.seconds["distillation"],
        "distillations": [result._asdict() for result in record.distillations],
    }
    if tokenizer is not None:
        row["perplexity"] = real_lm.perplexity(
            model.to(device), real_lm.tokens_of(tokenizer, args.text, "test"), settings
        )
    timing.write_json(args.output, timing.provenance(device.type) | {"rows": [row]})


def log_to(path: Path) -> None:
    """Write what this process logs into a file as it goes and, when it is told to end, where its threads are."""
    handler = logging.FileHandler(path, "w")
    handler.setFormatter(logging.Formatter("{relativeCreated:10,.0f} ms  {name}: {message}", style="{"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("sab_hf").setLevel(logging.INFO)
    faulthandler.register(signal.SIGTERM, file=handler.stream, chain=True)


def launcher(gpus: int) -> list[str]:
    """Return the arguments of Python that start so many processes.

    Each would look for the launcher by the name of this machine, which need not be known anywhere, if it had no address.
    """
    options = f"--standalone --local-addr 127.0.0.1 --nproc-per-node {gpus}"
    return ["-m", "torch.distributed.run", *options.split()] if gpus > 1 else []


def run(
    name: str, gpus: int, free: Queue, lock: Lock, args: argparse.Namespace, deadline: float, sharing: int
) -> str | None:
    """Run a case on so many GPUs; returns why it has no row, or None.

    free: GPUs that are free, for a case of one; lock: of the output; sharing: runs that share the time that is left
    """
    part = args.output.with_suffix(f".{name.replace(' ', '_')}.{gpus}.json")
    command = [sys.executable, *launcher(gpus), __file__, "--cases", name, "--process-of", str(gpus)]
    command += ["--output", str(part), "--model", args.model, "--text", args.text]
    device = free.get() if gpus == 1 else None
    own = {"CUDA_VISIBLE_DEVICES": device} if device is not None and torch.cuda.is_available() else {}
    for old in (part, *_logs(part)):
        old.unlink(missing_ok=True)
    begun = time.monotonic()
    with part.with_suffix(".log").open("w") as said:
        process = subprocess.Popen(
            command, env=os.environ | own, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(max(1.0, (deadline - begun) / sharing))
        except subprocess.TimeoutExpired:
            end(process)
            return f"it did not end within {time.monotonic() - begun:.0f} s\n{last_lines(part)}"
        finally:
            if device is not None:
                free.put(device)
    if process.returncode:
        return f"it ended with an error\n{last_lines(part)}"
    with lock:
        timing.merge_rows(args.output, json.loads(part.read_text()), KEY)
    part.unlink()
    return None


def end(process: subprocess.Popen) -> None:
    """End a run. A launcher that is killed leaves its processes behind, so it is asked first."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()


def _logs(part: Path) -> list[Path]:
    """Return the logs of the run that writes its row into `part`, that of the launcher first."""
    return [part.with_suffix(".log"), *sorted(part.parent.glob(f"{glob.escape(part.stem)}.*.log"))]


def last_lines(part: Path) -> str:
    """Return the last lines of these logs."""
    lines = []
    for path in _logs(part):
        lines += [f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-LAST_LINES:]]
    return "\n".join(lines)


def table(path: Path) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| case | GPUs | ms a step | peak of each, GiB | predicted, GiB | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for row in json.loads(path.read_text())["rows"]:
        peaks = ", ".join(f"{peak:.1f}" for peak in row["peak_gib_of_each"])
        perplexity = f"{row['perplexity']:.2f}" if "perplexity" in row else "–"
        cells = [row["case"], row["gpus"], f"{row['ms_a_step']:.0f}", peaks, f"{row['predicted_gib']:.1f}", perplexity]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=["7b", "72b"])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", default="smollm2", help="folder of the model with real weights")
    real_lm.add_text_folder(parser)
    parser.add_argument("--deadline", type=float, default=560.0, help="seconds for all")
    parser.add_argument("--output", type=Path, default=Path("several_gpus.json"))
    parser.add_argument("--process-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process_of:
        work(args.cases[0], args)
        return
    deadline = time.monotonic() + args.deadline
    lock, free, count = Lock(), Queue(), max(1, torch.cuda.device_count())
    for device in visible_gpus(count):
        free.put(device)
    for gpus in sorted(set(args.gpus), reverse=True):
        with ThreadPoolExecutor(count if gpus == 1 else 1) as pool:
            begun = {}
            for i, name in enumerate(args.cases):
                sharing = len(args.cases) - i if gpus > 1 else 1
                begun[name] = pool.submit(run, name, gpus, free, lock, args, deadline, sharing)
            for name, future in begun.items():
                if (problem := future.result()) is not None:
                    print(f"{name} on {gpus}: not measured: {problem}", flush=True)
    if args.output.exists():
        print(table(args.output))


if __name__ == "__main__":
    main()
