"""Several processes give the result of one, to rounding, and end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import forked
from safetensors.torch import load_file
from scale_worker import MEASURED, NUM_BLOCKS, launch, main, run
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sab_hf.machine import distributed
from sab_hf.method.hessian import SecondMoments

WORKER = Path(__file__).parents[1] / "scale_worker.py"


def check_models(
    folder: Path, count: int, alone: dict[str, torch.Tensor], refined: bool = True, tolerance: float = 0.002
) -> None:
    """All processes have one model, which is that of a single process to rounding.

    Training of this random model amplifies rounding from block to block, so with it only the first is held, to `tolerance`.
    """
    states = [load_file(folder / f"{rank}.safetensors") for rank in range(count)]
    for other in states[1:]:
        assert all(torch.equal(other[name], states[0][name]) for name in states[0])
    assert alone.keys() == states[0].keys()
    for name, tensor in alone.items():
        got, first = states[0][name], ".layers.0." in name
        if refined and ".layers." in name and not first:
            continue
        if name.endswith("signs"):  # rounding turns a few signs whose two values are as good, and later blocks see that
            flipped = ((got ^ tensor)[..., None] >> torch.arange(8) & 1).float().mean()
            assert flipped < (tolerance if first else 0.15), name
        elif not name.endswith("k_proj.bias"):  # has no effect, so its gradient is nothing but rounding
            if name.endswith("scale"):
                got, tensor = got.view(torch.float16).float(), tensor.view(torch.float16).float()
            assert (got.float() - tensor.float()).norm() <= (tolerance if first else 0.3) * tensor.float().norm(), name


def test_two_processes_of_torchrun_give_the_model_of_one(tmp_path):
    """With the launcher that `torchrun --standalone` calls; its workers are forked, which spares their imports."""
    changes = {"refine_steps": 3}
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
    )
    done = forked(lambda: elastic_launch(settings, main)(str(tmp_path / "RANK.safetensors"), json.dumps(changes)))
    assert done.returncode == 0, done.stderr
    check_models(tmp_path, 2, run(**changes).state_dict())


@pytest.mark.slow
def test_two_processes_of_accelerate_give_the_model_of_one(tmp_path):
    changes = {"refine_steps": 3}
    command = f"{sys.executable} -m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    path = os.pathsep.join([str(WORKER.parents[1]), str(WORKER.parent)])
    done = subprocess.run(
        [
            *f"{command} --mixed_precision no --dynamo_backend no".split(),
            *(WORKER, tmp_path / "RANK.safetensors", json.dumps(changes)),
        ],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check_models(tmp_path, 2, run(**changes).state_dict())


def test_more_processes_than_batches_give_the_model_of_one(tmp_path):
    """Five processes on three batches; the first commits for all."""
    codes = launch(5, tmp_path / "RANK.safetensors", tmp_path, checkpoint_dir=str(tmp_path / "run"))
    assert codes == [0] * 5, [file.read_text() for file in tmp_path.glob("error *")]
    check_models(tmp_path, 5, run().state_dict())
    assert len(list((tmp_path / "run").glob("*.safetensors"))) == NUM_BLOCKS


def test_processes_measure_one_sensitivity(tmp_path):
    """One process has no batch to measure on; sizes and weights are those of a single process."""
    changes = MEASURED | {"refine_steps": 0, "sensitivity_samples": 4}
    assert launch(3, tmp_path / "RANK.safetensors", tmp_path, **changes) == [0] * 3
    check_models(tmp_path, 3, run(**changes).state_dict(), refined=False)


def test_processes_distil_one_model(tmp_path):
    """One of three processes has no batch; gradients and losses are sums over all."""
    changes = {"refine_steps": 0, "distil_steps": 3, "distil_batch": 3}
    codes = launch(3, tmp_path / "RANK.safetensors", tmp_path, **changes)
    assert codes == [0] * 3, [file.read_text() for file in tmp_path.glob("error *")]
    # Adam turns the rounding of a gradient near zero into a whole step
    check_models(tmp_path, 3, run(**changes).state_dict(), tolerance=0.03)


def test_process_that_is_killed_ends_the_others_with_a_reason(tmp_path):
    """What was finished before is kept, and a single process can go on with it."""
    folder = tmp_path / "run"
    settings = {"checkpoint_dir": str(folder), "process_timeout": 60}
    codes = launch(3, tmp_path / "RANK.safetensors", tmp_path, mortal=1, **settings)
    assert codes == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        message = (tmp_path / f"error {rank}").read_text()
        assert f"process {rank} lost another process while" in message
        assert "With `checkpoint_dir`, the finished blocks are kept" in message
    assert len(list(folder.glob("*.safetensors"))) == 1
    run(checkpoint_dir=str(folder))
    assert len(list(folder.glob("*.safetensors"))) == NUM_BLOCKS


# ---- one process


@pytest.fixture
def ranks(monkeypatch):
    """Pretend to be one of several processes where nothing is sent."""

    def pretend(rank: int, size: int) -> None:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "size", lambda: size)

    return pretend


@pytest.mark.parametrize(("items", "size"), [(7, 3), (2, 5), (0, 2), (4, 1)])
def test_shares_are_the_whole(ranks, items, size):
    shares = []
    for rank in range(size):
        ranks(rank, size)
        shares += distributed.share(list("abcdefg")[:items])
    assert sorted(shares) == list(enumerate("abcdefg"[:items]))


def test_dearest_task_goes_first_to_the_least_loaded(ranks):
    ranks(0, 2)
    assert distributed.assign({"q": 1.0, "k": 1.0, "down": 5.0, "up": 3.0}) == {"down": 0, "up": 1, "k": 1, "q": 1}


def test_one_process_sends_nothing():
    moments = SecondMoments(3, torch.device("cpu"))
    moments.add(torch.eye(3), torch.zeros(3))
    before = moments.matrices()[0].clone()
    distributed.start(torch.device("cpu"), 1.0)
    distributed.sum_moments({"a": moments}, ["a"], torch.device("cpu"))
    assert torch.equal(moments.matrices()[0], before)
    gradient = torch.ones(2)
    distributed.sum_gradients([gradient])
    assert torch.equal(gradient, torch.ones(2))
    assert distributed.sum_numbers({"a": 1.0}) == distributed.merge({"a": 1.0}) == {"a": 1.0}
    assert distributed.divide({"b": 1.0}, str.upper, torch.device("cpu")) == {"b": "B"}
    distributed.check_same({"config": 1})


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 were started on this machine, which has 2 GPUs; start 2"):
        distributed.start(torch.device("cuda:0"), 1.0)


def test_processes_of_different_runs_are_told_apart(ranks, monkeypatch):
    ranks(0, 2)
    monkeypatch.setattr(distributed, "_gather", lambda own: [own, own | {"config": {"bits": 2}}])
    with pytest.raises(ValueError, match=r"process 0 has the config \{'bits': 1\}, process 1 has \{'bits': 2\}"):
        distributed.check_same({"config": {"bits": 1}, "data": "x"})
