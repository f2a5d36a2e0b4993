"""The predictions of minutes and memory, held to the runs on a GPU that were made."""

from __future__ import annotations

import json

import known


def test_minutes_and_memory_are_those_of_the_runs():
    runs = known.gpu_runs()
    assert len(runs) >= 4
    for name, (found, run, faster_since) in runs.items():
        measured = {stage: s["seconds"] for stage, s in run["stages"].items()}
        faster = sum(measured[stage] - found.seconds[stage] for stage in faster_since)
        assert faster > 0 or not faster_since
        assert 0.7 < found.all_seconds / (run["seconds"] - faster) < 1.3, name
        assert 0.7 < found.peak_device / 2**30 / run["peak_gpu_gib"] < 1.3, name
        for stage, seconds in measured.items():
            if stage not in faster_since and seconds > 0.1 * run["seconds"]:
                assert 0.7 < found.seconds[stage] / seconds < 1.3, f"{name}, {stage}"


def test_measured_runs_on_a_cpu_are_as_predicted():
    """Of the file that `--measure` wrote; the constants of `costs.py` may have changed since."""
    rows = json.loads((known.ROOT / "benchmarks" / "results" / "known_cpu.json").read_text())["rows"]
    assert rows.keys() == known.CASES.keys()
    for name, row in rows.items():
        assert 0.7 < row["predicted_all"] / row["measured_all"] < 1.3, name
