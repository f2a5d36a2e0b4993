"""The benchmark of several GPUs, small, on CPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runner import visible_gpus

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_one_and_two_processes_give_rows_with_one_loss(tmp_path):
    output = tmp_path / "rows.json"
    command = [sys.executable, ROOT / "benchmarks" / "several_gpus.py", "--cases", "tiny", "--gpus", "1", "2"]
    done = subprocess.run([*command, "--output", output], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, two = json.loads(output.read_text())["rows"]
    assert (one["gpus"], two["gpus"]) == (1, 2), done.stdout
    losses = [[row["distillations"][0][key] for key in ("before", "after")] for row in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(two["peak_gib_of_each"]) == 2
    assert "| tiny | 2 |" in done.stdout


@pytest.mark.parametrize(("given", "expected"), [(None, ["0", "1"]), ("3,5", ["3", "5"]), ("a,b,c", ["a", "b"])])
def test_only_visible_gpus_are_shared_out(given, expected, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus(2) == expected
