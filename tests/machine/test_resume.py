"""A run that was killed continues after its last finished block, and gives the bytes of a run that was not."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import build_llava
from processes import FORK, begin_forked
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scale_worker import MEASURED, NUM_BLOCKS, build_config, run, write

import sab_hf
from sab_hf.machine.commits import RunFolder
from sab_hf.machine.fingerprint import Fingerprint

PRINT = Fingerprint({"bits": 1.1}, {"class": "A", "w": "1"}, "d", {"torch": "2"})
PAUSE = 0.1  # s before and after each commit of a run that will be killed, so that kills come between and within blocks


def start(output: Path, folder: Path) -> multiprocessing.Process:
    """Start a run in a process of its own, which makes the file `begun` when it has the folder to itself."""
    begun(folder).unlink(missing_ok=True)
    process = FORK.Process(target=_child, args=(output, folder))
    process.start()
    return process


def _child(output: Path, folder: Path) -> None:
    begin_forked()
    take, save = RunFolder.__init__, RunFolder.save

    def take_and_tell(self, *args):
        take(self, *args)
        begun(folder).touch()

    def save_slowly(self, *args):
        time.sleep(PAUSE)
        save(self, *args)
        time.sleep(PAUSE)

    RunFolder.__init__, RunFolder.save = take_and_tell, save_slowly
    write(run(checkpoint_dir=str(folder)).state_dict(), output)


def begun(folder: Path) -> Path:
    return folder.with_name("begun")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, torch.Tensor]:
    return run().state_dict()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """The folder of a run that came to its end."""
    folder = tmp_path_factory.mktemp("finished")
    run(checkpoint_dir=str(folder))
    return folder


@pytest.fixture
def finished(finished_run, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished_run, tmp_path / "finished")


def test_run_killed_ten_times_gives_the_bytes_of_one_that_was_not(uninterrupted, tmp_path):
    """Each kill comes at a random moment after none, one or two more blocks."""
    folder, output, chance = tmp_path / "run", tmp_path / "out.safetensors", random.Random(0)
    kills, committed = 0, set()
    while kills < 10:
        process = start(output, folder)
        wanted = len(list(folder.glob("*.safetensors"))) + chance.randrange(3)
        while process.is_alive() and not (begun(folder).exists() and len(list(folder.glob("*.safetensors"))) >= wanted):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 3 * PAUSE))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            committed.add(len(list(folder.glob("*.safetensors"))))
        else:
            assert process.exitcode == 0
            assert same(load_file(output), uninterrupted)
            for file in sorted(folder.glob("*.safetensors"))[chance.randrange(NUM_BLOCKS) :]:
                file.unlink()  # start over from somewhere, for the kills that are left
    assert len(committed) > 1  # kills came at different blocks
    last = start(output, folder)
    last.join()
    assert last.exitcode == 0
    assert same(load_file(output), uninterrupted)


def test_resumed_run_does_not_fit_again_and_keeps_its_record(tmp_path, uninterrupted, monkeypatch):
    folder = tmp_path / "run"
    first = run(checkpoint_dir=str(folder))
    monkeypatch.setattr("sab_hf.make.binarize.fit_linear", None)
    again = run(checkpoint_dir=str(folder))
    assert same(again.state_dict(), uninterrupted)
    assert again.sab_record.fits == first.sab_record.fits
    assert again.sab_record.refinements == first.sab_record.refinements


def test_random_generator_continues_where_it_was(tmp_path, monkeypatch):
    """A step that draws from the global generator draws what it would have drawn without the interruption."""
    drawn = []
    original = sab_hf.make.binarize._fit_block

    def draw(*args):
        drawn.append(float(torch.rand(())))
        return original(*args)

    monkeypatch.setattr("sab_hf.make.binarize._fit_block", draw)
    run(checkpoint_dir=str(tmp_path))
    whole, drawn[:] = list(drawn), []
    for file in sorted(tmp_path.glob("*.safetensors"))[2:]:
        file.unlink()
    run(checkpoint_dir=str(tmp_path))
    assert drawn == whole[2:]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"alternations": 3}, "`alternations` was 1, is 3"),
        ({"refine_steps": 0}, "`refine_steps` was 2, is 0"),
        ({"seed": 1}, "`seed` was 0, is 1; the calibration data changed"),
    ],
)
def test_another_config_is_refused_with_the_reason(finished, changes, reason):
    with pytest.raises(ValueError, match=f"belongs to another run: .*{reason}.*4 finished steps"):
        run(checkpoint_dir=str(finished), **changes)


def test_another_model_is_refused_for_one_changed_weight(finished, processor):
    model = build_llava(attention_bias=True, num_hidden_layers=NUM_BLOCKS)
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 1
    with pytest.raises(ValueError, match=r"weights changed \(1 tensors, first `lm_head.weight`\)"):
        sab_hf.quantize(model, processor, None, build_config(checkpoint_dir=str(finished)))


def test_another_software_is_a_warning(tmp_path, caplog):
    RunFolder(tmp_path, PRINT).close()
    RunFolder(tmp_path, Fingerprint(PRINT.config, PRINT.model, PRINT.data, {"torch": "3"})).close()
    assert "may differ by rounding: torch was 2, is 3" in caplog.text


# ---- one folder


def test_step_comes_back_as_it_was(tmp_path):
    checkpoint = RunFolder(tmp_path, PRINT)
    tensors = {"a": torch.randn(3, 5).bfloat16(), "b": torch.arange(4, dtype=torch.uint8), "c": torch.tensor(1.5)}
    checkpoint.save("x.0", tensors, {"error": 0.1, "tokens": {"text": 3}})
    step = checkpoint.load("x.0")
    assert same(step.tensors, tensors)
    assert step.record == {"error": 0.1, "tokens": {"text": 3}}
    assert checkpoint.load("x.1") is None
    assert checkpoint.steps() == ["x.0"]


def test_only_what_a_killed_run_left_half_written_is_removed(tmp_path):
    for name in ("thesis.tmp", "x.0.safetensors.tmp", "fingerprint.json.tmp"):
        (tmp_path / name).touch()
    RunFolder(tmp_path, PRINT).close()
    assert [file.name for file in tmp_path.glob("*.tmp")] == ["thesis.tmp"]


def test_folder_in_use_is_refused(tmp_path):
    checkpoint = RunFolder(tmp_path, PRINT)
    with pytest.raises(RuntimeError, match="another process is using"):
        RunFolder(tmp_path, PRINT)
    checkpoint.close()
    RunFolder(tmp_path, PRINT).close()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:3], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_damaged_step_is_named_and_the_others_are_kept(finished, uninterrupted, damage):
    files = sorted(finished.glob("*.safetensors"))
    kept = {file.name: file.read_bytes() for file in files if file != files[1]}
    files[1].write_bytes(damage(files[1].read_bytes()))
    with pytest.raises(ValueError, match=rf"{files[1].name} is damaged .*delete it"):
        run(checkpoint_dir=str(finished))
    assert {name: (finished / name).read_bytes() for name in kept} == kept
    files[1].unlink()
    assert same(run(checkpoint_dir=str(finished)).state_dict(), uninterrupted)


def test_full_disk_loses_nothing(tmp_path, uninterrupted, monkeypatch):
    """The third commit finds no room; the two before it are whole, and the next run continues after them."""
    flush, count = os.fsync, 0

    def fill(descriptor):
        nonlocal count
        count += 1
        if count == 7:  # fingerprint, two blocks: two each, for the file and for its folder
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr("os.fsync", fill)
    with pytest.raises(OSError, match=r"layers\.2 .*No space left.* 2 steps before it are kept; free space") as caught:
        run(checkpoint_dir=str(tmp_path))
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert list(tmp_path.glob("*.tmp")) == []
    assert same(run(checkpoint_dir=str(tmp_path)).state_dict(), uninterrupted)


def test_sensitivity_is_measured_once(tmp_path, monkeypatch):
    """A run that resumes reads what was measured, and gives the same sizes and bytes."""
    expected = run(**MEASURED, checkpoint_dir=str(tmp_path)).state_dict()
    assert (tmp_path / "sensitivity.safetensors").exists()
    monkeypatch.setattr("sab_hf.make.sizes.measure_sensitivity", None)
    for kept in (1, 3):
        for file in sorted(tmp_path.glob("model*.safetensors"))[kept:]:
            file.unlink()
        assert same(run(**MEASURED, checkpoint_dir=str(tmp_path)).state_dict(), expected)


def test_steps_without_a_fingerprint_are_refused(tmp_path):
    checkpoint = RunFolder(tmp_path, PRINT)
    checkpoint.save("x", {}, {})
    checkpoint.close()
    (tmp_path / "fingerprint.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        RunFolder(tmp_path, PRINT)
    (tmp_path / "fingerprint.json").unlink()
    with pytest.raises(ValueError, match="but no fingerprint"):
        RunFolder(tmp_path, PRINT)


# ---- a file is the step that its name says, of the run of its folder


@pytest.mark.parametrize("swapped", [True, False])
def test_steps_under_each_other_s_names_are_refused(finished, swapped):
    first, second = sorted(finished.glob("*.safetensors"))[:2]
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0 if swapped else 1])
    with pytest.raises(
        ValueError, match=rf"{first.name} is damaged \(it is `{second.stem}`; files were renamed.*delete it"
    ):
        run(checkpoint_dir=str(finished))


def test_a_step_of_another_run_is_refused(tmp_path):
    for name, value in (("here", 1.0), ("there", 2.0)):
        checkpoint = RunFolder(tmp_path / name, Fingerprint({"damping": value}, {}, "", {}))
        checkpoint.save("x.0", {"a": torch.tensor(value)}, {})
        checkpoint.close()
    (tmp_path / "here/x.0.safetensors").write_bytes((tmp_path / "there/x.0.safetensors").read_bytes())
    checkpoint = RunFolder(tmp_path / "here", Fingerprint({"damping": 1}, {}, "", {"torch": "another"}))
    with pytest.raises(ValueError, match=r"x\.0\.safetensors is damaged \(it is `x\.0` of another run; "):
        checkpoint.load("x.0")
    checkpoint.save("x.1", {}, {})
    assert checkpoint.load("x.1") is not None
    checkpoint.close()
    assert RunFolder(tmp_path / "here", Fingerprint({"damping": 1.0}, {}, "", {})).load("x.1") is not None


@pytest.mark.parametrize("key", ["step", "run", "digest", "record"])
def test_what_says_which_step_it_is_cannot_be_left_out(tmp_path, key):
    checkpoint = RunFolder(tmp_path, PRINT)
    checkpoint.save("x", {"a": torch.ones(2)}, {})
    path = tmp_path / "x.safetensors"
    with safe_open(path, framework="pt") as reader:
        metadata = reader.metadata()
    del metadata[key]
    save_file({"a": torch.ones(2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="its digest does not fit its content"):
        checkpoint.load("x")


def test_steps_of_early_versions_are_read(tmp_path):
    """They hold no name, and a digest of tensors and record alone."""
    checkpoint = RunFolder(tmp_path, PRINT)
    tensor = torch.arange(3.0)
    digest = hashlib.sha256(b'{"rows": 4}a torch.float32 [3]' + tensor.numpy().tobytes()).hexdigest()
    save_file({"a": tensor}, tmp_path / "x.safetensors", metadata={"record": '{"rows": 4}', "digest": digest})
    assert torch.equal(checkpoint.load("x").tensors["a"], tensor)
    assert checkpoint.load("x").record == {"rows": 4}
