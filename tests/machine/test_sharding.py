"""Processes that keep rows each: what they train is what one process trains, however weights come to passes."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_zoo import FAMILIES
from helpers import build_llama
from safetensors.torch import load_file, save_file
from scale_worker import fork

import sab_hf
from sab_hf import SABQuantizationConfig
from sab_hf.machine import distributed
from sab_hf.make import binarize, distil
from sab_hf.make.refine import draw_batches
from sab_hf.method.trainable import Share, TrainablePlanes

IDS = torch.randint(0, 256, (24, 14), generator=torch.Generator().manual_seed(0))
PORTABLE = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 1, "num_hidden_layers": 1}
"""Widths that Q1_0 can hold; column scales of a portable model stay 1."""
State = dict[str, torch.Tensor]


def distilled(portable: bool = False, rows: int = 1, **changes) -> tuple[State, distil.DistilResult]:
    """Quantize a small model with batches of so many rows; returns its state and the losses of its distillation."""
    given = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in IDS.split(rows)]
    values = {"num_samples": 24, "batch_size": rows, "fit": "elementwise", "alternations": 1, "refine_steps": 0}
    values |= {"distil_steps": 12, "distil_batch": 2, "distil_latent_rate": 2e-2, "distil_scale_rate": 2e-2}
    values |= {"budget": "uniform", "significance": "paper", "process_timeout": 60}
    model = build_llama(**PORTABLE if portable else {})
    config = SABQuantizationConfig(**values | changes, portable="gguf" if portable else None)
    record = sab_hf.quantize(model, None, given, config)
    return model.state_dict(), record.distillations[0]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Callable[..., tuple[Path, State, distil.DistilResult]]:
    """Make a run of one process; returns its folder, from which distillation alone is left to do, and what it gave."""

    @functools.cache
    def make(**changes) -> tuple[Path, State, distil.DistilResult]:
        folder = tmp_path_factory.mktemp("run") / "blocks"
        state, result = distilled(checkpoint_dir=str(folder), **changes)
        assert result.after < result.before
        next(folder.glob("distilled*")).unlink()
        return folder, state, result

    return make


@pytest.fixture
def lend(monkeypatch) -> Callable[[], None]:
    """Have several processes lend each other weights, as if none had room for all."""

    def lend() -> None:
        monkeypatch.setattr(distil, "blocks_at_once", lambda weights, *_: distil.Way(len(weights), False, True))
        monkeypatch.setattr(distil, "WEIGHT_BYTES", 1e15)

    return lend


def several(count: int, folder: Path, output: Path, **changes) -> list[tuple[State, list[float]]]:
    """Go on with a run in several processes; returns the state and the losses of each."""
    output.mkdir()

    def work(rank: int) -> None:
        state, result = distilled(checkpoint_dir=str(folder), **changes)
        state = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(state | {"result": torch.tensor(result, dtype=torch.float64)}, output / str(rank))

    assert fork(count, work, output) == [0] * count, [file.read_text() for file in output.glob("error*")]
    states = [load_file(output / str(rank)) for rank in range(count)]
    return [(state, state.pop("result").tolist()) for state in states]


def check(states: list[tuple[State, list[float]]], expected: distil.DistilResult, tolerance: float) -> None:
    """All processes have one model, whose losses are those of one process."""
    for state, found in states:
        assert found == pytest.approx(list(expected), rel=tolerance)
        assert all(torch.equal(tensor, states[0][0][name]) for name, tensor in state.items())


@pytest.mark.parametrize("lent", [False, True])
def test_two_processes_give_the_bytes_of_one_where_sums_have_one_order(tmp_path, done, lend, lent):
    """With two batches a step, and column scales that stay 1: the gradients of two processes are `a + b` in any order."""
    folder, expected, result = done(portable=True)
    shutil.copytree(folder, tmp_path / "copy")
    if lent:
        lend()
    states = several(2, tmp_path / "copy", tmp_path / "out", portable=True)
    check(states, result, 1e-12)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in states[0][0].items())


def test_three_processes_give_the_loss_of_one(tmp_path, done, lend):
    """Five batches a step: one process has one fewer, and rows of 40, 20 and 88 are not multiples of three."""
    folder, _, result = done(distil_batch=5)
    shutil.copytree(folder, tmp_path / "copy")
    lend()
    check(several(3, tmp_path / "copy", tmp_path / "out", distil_batch=5), result, 1e-4)


def test_process_that_dies_in_a_step_ends_the_others_and_another_number_goes_on(tmp_path, done, monkeypatch):
    """Three processes that lend each other weights are left in a pass; two with all weights go on where they were."""
    folder, _, result = done(distil_batch=5)
    shutil.copytree(folder, tmp_path / "copy")
    original, begun = distil._Loss._divergence, distil._Loss.accumulate_gradients
    with monkeypatch.context() as patch:

        def die(self, state, *rest):
            if distributed.rank() == 1 and float(self._step) == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, state, *rest)

        patch.setattr(distil._Loss, "_divergence", die)
        patch.setattr(distil, "blocks_at_once", lambda weights, *_: distil.Way(len(weights), False, True))
        patch.setattr(distil, "WEIGHT_BYTES", 1e15)  # lent
        work = functools.partial(distilled, checkpoint_dir=str(tmp_path / "copy"), distil_batch=5)
        assert fork(3, lambda _: work(), tmp_path) == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        message = (tmp_path / f"error {rank}").read_text()
        assert f"process {rank} lost another process while" in message
    assert len(list((tmp_path / "copy").glob("*unfinished*"))) == 4  # its record, two blocks, the rest

    def late(self, adam, numbers, step):
        assert step >= 6  # not from the beginning
        begun(self, adam, numbers, step)

    monkeypatch.setattr(distil._Loss, "accumulate_gradients", late)
    check(several(2, tmp_path / "copy", tmp_path / "out", distil_batch=5), result, 1e-4)
    assert not list((tmp_path / "copy").glob("*unfinished*"))


def test_process_out_of_memory_has_all_repeat_the_step(tmp_path, done, lend, monkeypatch):
    """It fails on the way back of a pass of a batch of four; from then on all processes take two samples at once."""
    folder, _, result = done(rows=4, distil_batch=8)
    shutil.copytree(folder, tmp_path / "copy")
    lend()
    original = distil._Loss._go_back

    def fail(self, output, gradient):
        if distributed.rank() == 1 and output.shape[0] > 2:
            output = output * 1
            output.register_hook(lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("made up")))
        original(self, output, gradient)

    monkeypatch.setattr(distil._Loss, "_go_back", fail)
    check(several(2, tmp_path / "copy", tmp_path / "out", rows=4, distil_batch=8), result, 1e-4)


@pytest.mark.parametrize("call", [14 + 4, 14 + 14 + 3])
def test_process_without_memory_for_its_rows_sends_what_the_others_wait_for(tmp_path, done, lend, monkeypatch, call):
    """A Linear amid the first block, there and on the way back, after the 14 of a measurement; then all take fewer samples."""
    folder, _, result = done(rows=4, distil_batch=8)
    shutil.copytree(folder, tmp_path / "copy")
    lend()
    original, calls = TrainablePlanes.build, []

    def fail(self, rows):
        calls.append(rows)
        if distributed.rank() == 1 and len(calls) == call:
            raise torch.OutOfMemoryError("made up")
        return original(self, rows)

    monkeypatch.setattr(TrainablePlanes, "build", fail)
    check(several(2, tmp_path / "copy", tmp_path / "out", rows=4, distil_batch=8), result, 1e-4)


def test_loss_that_is_not_finite_on_one_process_is_an_error_on_all(tmp_path, done, monkeypatch):
    folder, _, _ = done(distil_batch=5)
    shutil.copytree(folder, tmp_path / "copy")
    original = distil._Loss._loss

    def spoil(self, *arguments):
        gradient = original(self, *arguments)
        if distributed.rank() == 1:
            self._sum.fill_(torch.nan)
        return gradient

    monkeypatch.setattr(distil, "HELD_OUT", 4)  # batches 2, 6, 10, … are held out, so all processes have one
    monkeypatch.setattr(distil._Loss, "_loss", spoil)
    work = functools.partial(distilled, checkpoint_dir=str(tmp_path / "copy"), distil_batch=5)
    assert fork(3, lambda _: work(), tmp_path) == [1, 1, 1]
    for rank in range(3):
        assert "is not finite on process 1, and finite on process 0" in (tmp_path / f"error {rank}").read_text()


@pytest.mark.parametrize("what", ["model", "pictures"])
def test_processes_with_other_models_or_pictures_are_refused(tmp_path, what):
    def work(rank: int) -> None:
        model = build_llama(seed=rank if what == "model" else 0)
        mask = torch.ones_like(IDS[:2])
        given = {"input_ids": IDS[:2], "attention_mask": mask, "labels": IDS[:2] + (rank if what == "pictures" else 0)}
        sab_hf.quantize(model, None, [given], SABQuantizationConfig(num_samples=2, process_timeout=60))

    assert fork(2, work, tmp_path) == [1, 1]
    assert "all processes must quantize the same: process 0 has the " + what in (tmp_path / "error 0").read_text()


def test_process_with_an_error_leaves_without_the_others(tmp_path, monkeypatch):
    """With NCCL it would wait for them at its end, as they wait for it."""
    at_exit, original = [], binarize._fit_block
    monkeypatch.setattr(distributed.atexit, "register", at_exit.append)
    monkeypatch.setattr(distributed.atexit, "unregister", at_exit.remove)

    def fail(*arguments):
        if distributed.rank() == 1:
            raise ValueError("of one process alone")
        return original(*arguments)

    def work(rank: int) -> None:
        try:
            distilled(distil_steps=1)
        finally:
            (tmp_path / f"waits {rank}").write_text(str(distributed._leave in at_exit))

    assert fork(2, work, tmp_path) == [0, 0]
    assert [(tmp_path / f"waits {rank}").read_text() for rank in range(2)] == ["True"] * 2
    monkeypatch.setattr(binarize, "_fit_block", fail)
    assert fork(2, work, tmp_path) == [1, 1]
    assert [(tmp_path / f"waits {rank}").read_text() for rank in range(2)] == ["False"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mllama", "gemma3n", "qwen3_moe"])
def test_blocks_and_experts_that_a_process_leaves_out_are_lent_to_the_others(tmp_path, lend, family):
    """Blocks that run for images only, states that blocks leave for later ones, experts without tokens."""
    if family not in FAMILIES:
        pytest.skip("not in this version of transformers")

    def result(_: int = 0) -> list[float]:
        made = FAMILIES[family]()
        values = {"fit": "elementwise", "alternations": 1, "refine_steps": 0, "distil_steps": 3, "distil_batch": 2}
        values |= {"budget": "uniform", "significance": "paper", "process_timeout": 60, "distil_latent_rate": 1e-3}
        config = SABQuantizationConfig(num_samples=8, **values)
        return list(sab_hf.quantize(made.model, None, made.batches, config).distillations[0])

    expected = result()
    lend()

    def work(rank: int) -> None:
        (tmp_path / str(rank)).write_text(json.dumps(result()))

    assert fork(2, work, tmp_path) == [0, 0], [file.read_text() for file in tmp_path.glob("error*")]
    for rank in range(2):
        assert json.loads((tmp_path / str(rank)).read_text()) == pytest.approx(expected, rel=1e-3)


# ---- one process


@pytest.mark.parametrize(("rows", "parts"), [(7, 3), (2, 5), (8, 4), (5, 1)])
def test_own_rows_are_all_rows_once(rows, parts):
    own = [range(rows)[Share(part, parts).own(rows)] for part in range(parts)]
    assert [row for part in own for row in part] == list(range(rows))
    assert all(len(part) <= Share(0, parts).each(rows) for part in own)


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_batches_of_a_step_are_those_of_different_processes(processes):
    draws = draw_batches(dict.fromkeys(range(32), 1), 8, seed=0)
    for _ in range(8):  # two epochs
        owners = [number % processes for number in next(draws)]
        assert all(owners.count(process) == 8 // processes for process in range(processes))


def test_more_processes_train_more_blocks_at_once():
    """12 / P + 8 bytes with all weights; 14 / P, or 8 / P compactly, and weights and gradients of two blocks beside them."""
    gpu, weights = torch.device("cuda"), [100] * 28
    whole = 28 * 100 * (12 / 4 + 8)
    assert distil.blocks_at_once(weights, gpu, whole / 0.7 + 1, 4) == (28, False, False)
    lent = 28 * 100 * 14 / 4 + 800
    assert distil.blocks_at_once(weights, gpu, lent / 0.7 + 1, 4) == (28, False, True)
    compact = 28 * 100 * 8 / 4 + 800
    assert distil.blocks_at_once(weights, gpu, compact / 0.7 + 1, 4) == (28, True, True)
    assert distil.blocks_at_once(weights, gpu, compact / 0.7 - 1, 4) == (14, True, True)
    assert distil.blocks_at_once(weights, torch.device("cpu"), 28 * 100 * 16 / 4 / 0.7, 4) == (14, False, True)
