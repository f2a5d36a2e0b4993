"""The sweep of GPU kernels: what is kept of it holds the rules by which `kernels/cuda/tiles.py` chooses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import speed_gpu_sweep

SWEEP = Path(speed_gpu_sweep.__file__).parent / "results" / "speed_gpu_sweep_h200.json"


@pytest.fixture(scope="module")
def swept():
    return json.loads(SWEEP.read_text())


def test_the_rules_choose_what_is_nearly_the_fastest_of_each_measured_cell(swept):
    cells = speed_gpu_sweep.cells(swept)
    assert len(cells) == len(speed_gpu_sweep.SHAPES) * len(speed_gpu_sweep.SCHEMES) * len(speed_gpu_sweep.INPUTS)
    assert [cell for cell, (_, choice) in cells.items() if choice is None] == []
    slower = {cell: choice["us"] / rows[0]["us"] for cell, (rows, choice) in cells.items()}
    assert {cell: ratio for cell, ratio in slower.items() if ratio > 1.1} == {}
    assert sum(ratio <= 1.05 for ratio in slower.values()) == 185  # as the comment in `tiles.py` says


def test_the_sweep_measures_what_the_rules_choose(swept):
    """A sweep of another day can tell of every cell how good the choice is."""
    for (shape, scheme, batch), _ in speed_gpu_sweep.cells(swept).items():
        arguments = (speed_gpu_sweep.SHAPES[shape], *speed_gpu_sweep.SCHEMES[scheme], batch, swept["processors"])
        assert speed_gpu_sweep.chosen(*arguments) in speed_gpu_sweep.candidates(*arguments)


def test_what_is_wrong_or_not_measured_is_shown(swept, capsys):
    rows = [row for row in swept["rows"] if (row["shape"], row["scheme"], row["batch"]) == ("down", "one plane", 64)]
    speed_gpu_sweep.show(swept | {"rows": [rows[0] | {"right": False}, *rows[1:]], "problems": [["down", "lost"]]})
    wrong, problem, cell, last = capsys.readouterr().out.splitlines()
    assert wrong.startswith("WRONG {'shape': 'down'")
    assert problem == "PROBLEM down lost"
    assert cell.endswith("; the rules' choice was not measured")
    assert last.startswith("0 of 0 choices")
