"""The benchmark of the layers that vLLM runs, dry: every product on the CPU, on shapes of a hundredth, and nothing timed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import speed_gpu
import speed_gpu_peers

LAYERS = {"q, k, v": [(32, 48), (8, 48), (8, 48)], "o": [(40, 40)]}


@pytest.fixture
def dry(monkeypatch):
    """Run on the CPU, and keep what every timed call returns."""
    seen = []

    def call_all(calls):
        seen.append([call() for call in calls])
        return 2.0

    for name, value in {
        "DEVICE": "cpu", "ROTATING_BYTES": 1000, "SERVED": LAYERS, "SERVED_TOKENS": (1, 8), "median_graph_us": call_all,
    }.items():  # fmt: skip
        monkeypatch.setattr(speed_gpu, name, value)
    return seen


def test_every_layer_is_run_at_every_number_of_tokens(dry):
    saved = []
    results = speed_gpu.run_served(lambda partial: saved.append(len(partial["rows"])), lambda line: None)
    assert [(row["layer"], row["tokens"]) for row in results["rows"]] == [
        (layer, tokens) for tokens in (1, 8) for layer in LAYERS
    ]
    assert not [row for row in results["rows"] if "error" in row]
    assert results["blocks"] == [{"tokens": n, "us": 4.0, "dense_us": 4.0, "ratio": 1.0} for n in (1, 8)]
    assert saved == [1, 2, 2, 3, 4, 4]
    shapes = [[(n, 48), (n, 40)] for n in (1, 8)]
    packed, dense = dry[::2], dry[1::2]
    for tokens, at in zip((1, 8), range(0, 4, 2), strict=True):
        assert [y.shape for y in packed[at][0]] == [(tokens, rows) for rows, _ in LAYERS["q, k, v"]]
        assert packed[at + 1][0].shape == (tokens, 40)
        assert [dense[at][0].shape, dense[at + 1][0].shape] == shapes[at // 2]


def test_a_layer_that_fails_leaves_the_others(dry, monkeypatch):
    monkeypatch.setattr(speed_gpu, "sab_linears", lambda *operands: 1 / 0)
    results = speed_gpu.run_served(lambda partial: None, lambda line: None)
    assert ["error" in row for row in results["rows"]] == [True, False] * 2
    assert results["blocks"] == []


def test_peers_that_cannot_run_are_named_and_leave_the_others(dry, monkeypatch):
    monkeypatch.setattr(speed_gpu_peers, "SHAPES", [(40, 128)])
    monkeypatch.setattr(speed_gpu_peers.timing, "median_graph_us", speed_gpu.median_graph_us)
    missing = {"gemlite, 2 bits": ("a_package_that_is_not_there", 2.5, speed_gpu_peers.gemlite)}
    monkeypatch.setattr(speed_gpu_peers, "KINDS", speed_gpu_peers.KINDS | missing)
    results = speed_gpu_peers.run(lambda partial: None, lambda line: None)
    assert results["not run"]["gemlite, 2 bits"] == "a_package_that_is_not_there is not installed"
    done = [(row["kind"], row["tokens"], row["ratio"]) for row in results["rows"] if "error" not in row]
    own = ("dense", "one plane", "one plane + 10 %", "two planes")
    assert done[: 4 * len(own)] == [(kind, tokens, 1.0) for kind in own for tokens in speed_gpu_peers.TOKENS]
    assert [y.shape for y in dry[5]] == [(8, 40)] * len(dry[5])
    failed = {row["kind"] for row in results["rows"] if "error" in row}
    assert "PyTorch, int4" in failed  # it has no kernel here
