"""The number of CPU threads: what is free, what the user chose, and that it is put back."""

from __future__ import annotations

import os
import time

import pytest
import torch
from helpers import build_llava

from sab_hf import SABQuantizationConfig
from sab_hf.machine import threads
from sab_hf.machine.commits import RunFolder
from sab_hf.machine.fingerprint import fingerprint
from sab_hf.machine.resume import Steps
from sab_hf.machine.threads import Cores, crowding, free_threads, look
from sab_hf.machine.workspace import Workspace

CPU = torch.device("cpu")


@pytest.fixture
def four(monkeypatch):
    """A machine of four cores, whose number of threads nobody chose."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_bound", lambda: [0, 1, 2, 3])
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def busy(monkeypatch, cores: float, load: float | None = None) -> None:
    monkeypatch.setattr(threads, "look", lambda: Cores(4, cores, cores if load is None else load))


@pytest.mark.parametrize(("taken", "expected"), [(0, 4), (0.3, 4), (1, 3), (2.6, 1), (4, 1), (9, 1)])
def test_threads_are_as_many_as_free_cores(four, monkeypatch, taken, expected):
    busy(monkeypatch, taken)
    with free_threads(CPU):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 4


def test_number_is_put_back_after_an_error(four, monkeypatch):
    busy(monkeypatch, 3)
    with pytest.raises(KeyError), free_threads(CPU):
        raise KeyError
    assert torch.get_num_threads() == 4


def test_what_the_user_chose_stays(four, monkeypatch):
    busy(monkeypatch, 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with free_threads(CPU):
        assert torch.get_num_threads() == 4
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(3)  # no number that PyTorch takes by itself on four cores
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 4)
    with free_threads(CPU):
        assert torch.get_num_threads() == 3


def test_gpu_runs_keep_their_threads(four, monkeypatch):
    busy(monkeypatch, 4)
    with free_threads(torch.device("cuda")):
        assert torch.get_num_threads() == 4


def test_load_above_the_cores_is_said_once(four, monkeypatch, caplog):
    busy(monkeypatch, 3, load=9.5)
    with caplog.at_level("INFO", "sab_hf"), free_threads(CPU):
        pass
    said = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1
    assert "9.5 processes want 4 cores. This run computes with 1 thread," in said[0].getMessage()
    caplog.clear()
    busy(monkeypatch, 1)
    with caplog.at_level("INFO", "sab_hf"), free_threads(CPU):
        pass
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "computing with 3 of 4 cores" in caplog.text


def test_a_resumed_run_takes_the_number_of_before(four, monkeypatch, tmp_path):
    model = build_llava()

    def inside(taken: float) -> int:
        busy(monkeypatch, taken)
        run = fingerprint(model, [], SABQuantizationConfig(), device=CPU, processes=1)
        steps = Steps(Workspace.of(model), RunFolder(tmp_path, run))
        with free_threads(CPU, steps):
            number = torch.get_num_threads()
        steps.close()
        return number

    assert inside(2) == 2
    assert inside(0) == 2


def test_a_short_burst_and_an_old_load_count_little(monkeypatch):
    """Others are busy where both the moment and the last minute say so."""
    monkeypatch.setattr(threads, "_bound", lambda: [0, 1])
    monkeypatch.setattr("psutil.cpu_percent", _percent(100.0))
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 0.1, 0.1))
    assert look(0.0).busy == pytest.approx(0.1)
    monkeypatch.setattr("os.getloadavg", lambda: (8.0, 8.0, 8.0))
    assert look(0.0).busy > 1.5
    monkeypatch.setattr("psutil.cpu_percent", _percent(0.0))
    assert look(0.0).busy == 0
    assert crowding() == 4.0
    assert look(0.0).load == 8


def _percent(value: float):
    def cpu_percent(interval: float, percpu: bool) -> list[float]:
        time.sleep(0.02)  # asleep, as it is while it observes
        return [value, value]

    return cpu_percent


def test_quota_of_a_container_bounds_the_cores(monkeypatch, tmp_path):
    second = tmp_path / "cpu.max"
    monkeypatch.setattr(threads, "_QUOTAS", (second, tmp_path / "cpu.cfs_quota_us"))
    monkeypatch.setattr(threads, "_PERIOD", tmp_path / "cpu.cfs_period_us")
    assert threads._quota() == float("inf")
    second.write_text("150000 100000\n")
    assert threads._quota() == 1.5
    second.write_text("max 100000\n")
    assert threads._quota() == float("inf")
    second.unlink()
    (tmp_path / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert threads._quota() == float("inf")
    (tmp_path / "cpu.cfs_quota_us").write_text("300000\n")
    assert threads._quota() == 3.0


def test_the_command_line_waits_asleep_where_the_machine_is_busy(monkeypatch):
    import sab_hf_command

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    sab_hf_command.wait_asleep_where_busy()
    assert "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.setattr("os.getloadavg", lambda: (1e3, 0.0, 0.0))
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    sab_hf_command.wait_asleep_where_busy()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    sab_hf_command.wait_asleep_where_busy()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
