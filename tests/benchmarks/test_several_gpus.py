"""The benchmark of several GPUs, small, on CPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import several_gpus
from runner import visible_gpus

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_one_and_two_processes_give_rows_with_one_loss(tmp_path):
    output = tmp_path / "rows.json"
    command = [sys.executable, ROOT / "benchmarks" / "several_gpus.py", "--cases", "tiny", "--gpus", "1", "2"]
    done = subprocess.run([*command, "--output", output], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    two, one = json.loads(output.read_text())["rows"]
    assert (one["gpus"], two["gpus"]) == (1, 2), done.stdout
    losses = [[row["distillations"][0][key] for key in ("before", "after")] for row in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(two["peak_gib_of_each"]) == 2
    assert "| tiny | 2 |" in done.stdout
    for rank in range(2):
        assert "distillation …" in (tmp_path / f"rows.tiny.2.{rank}.log").read_text()


@pytest.mark.slow
def test_run_that_is_ended_says_where_its_processes_were_and_leaves_none(tmp_path):
    worker, part = tmp_path / "worker.py", tmp_path / "rows.tiny.2.json"
    worker.write_text(
        f"import os, pathlib, sys, time; sys.path[:0] = [{str(ROOT / 'benchmarks')!r}]\n"
        "import several_gpus\n"
        f"part, rank = pathlib.Path({str(part)!r}), os.environ['RANK']\n"
        "several_gpus.log_to(part.with_suffix(f'.{rank}.log'))\n"
        "part.with_suffix(f'.{rank}.pid').write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    with part.with_suffix(".log").open("w") as said:
        command = [sys.executable, *several_gpus.launcher(2), worker]
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    started = [part.with_suffix(f".{rank}.pid") for rank in range(2)]
    while not all(path.exists() and path.read_text() for path in started):
        assert process.poll() is None
        time.sleep(0.1)
    several_gpus.end(process)
    assert process.poll() is not None
    for path in started:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    said = several_gpus.last_lines(part)
    assert said.count('worker.py", line 6 in <module>') == 2, said


@pytest.mark.parametrize(("given", "expected"), [(None, ["0", "1"]), ("3,5", ["3", "5"]), ("a,b,c", ["a", "b"])])
def test_only_visible_gpus_are_shared_out(given, expected, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus(2) == expected
