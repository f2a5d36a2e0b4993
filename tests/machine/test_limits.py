"""When memory runs out in one block, fewer samples run at once, a warning says so, and the result is the same."""

from __future__ import annotations

import pytest
import torch
from helpers import build_llava
from scale_worker import run

from sab_hf.machine.limits import SampleLimit, take_samples
from sab_hf.make import refine
from sab_hf.passes import capture
from sab_hf.passes.states import block_output


@pytest.fixture
def scarce(monkeypatch):
    """Return a function: `scarce(module, rows, block)` lets passes of block number `block` of more than `rows` samples fail."""

    def limit(module, rows: int, block: int) -> None:
        def run_block(layer, index, state, hidden):
            if index == block and hidden.shape[0] > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.0 GiB")
            return block_output(layer, index, state, hidden)

        monkeypatch.setattr(module, "block_output", run_block)

    return limit


@pytest.mark.parametrize(("module", "doing"), [(capture, "running"), (refine, "measuring")])
def test_out_of_memory_falls_back_to_smaller_batches(scarce, caplog, module, doing):
    expected = run(batch_size=4)
    scarce(module, 1, 1)
    got = run(batch_size=4)
    assert f"out of memory while {doing} block 1: from now on 2 samples at once instead of 4" in caplog.text
    assert "1 samples at once instead of 2" in caplog.text
    for before, after in zip(expected.sab_record.refinements, got.sab_record.refinements, strict=True):
        assert after.before == pytest.approx(before.before, rel=0.02)
    first = "model.language_model.layers.0"
    for name, tensor in expected.get_submodule(first).state_dict().items():
        assert torch.equal(got.get_submodule(first).state_dict()[name], tensor), name  # came before the shortage


def test_gradients_of_a_failed_attempt_do_not_count(scarce, monkeypatch):
    """The shortage strikes in the middle of a step, when some batches have already left their gradients."""
    expected = run(batch_size=2)
    original, passes = refine._error, []

    def once(block, index, state, scale):
        passes.append(index)
        if torch.is_grad_enabled() and passes.count(0) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(block, index, state, scale)

    monkeypatch.setattr(refine, "_error", once)
    got = run(batch_size=2)
    assert len(passes) > 6
    first = expected.sab_record.refinements[0]
    assert got.sab_record.refinements[0].after == pytest.approx(first.after, rel=1e-3)


def test_second_moments_of_a_failed_attempt_do_not_count(scarce):
    expected = run(batch_size=4, refine_steps=0).sab_record.fits
    scarce(capture, 3, 0)
    got = run(batch_size=4, refine_steps=0).sab_record.fits
    assert [fit.tokens for fit in got] == [fit.tokens for fit in expected]
    assert got[0].error == pytest.approx(expected[0].error, rel=1e-4)


def test_one_sample_that_does_not_fit_is_an_error_that_says_what_to_lower(scarce):
    scarce(capture, 0, 2)
    with pytest.raises(RuntimeError, match="running block 2, with one sample at a time; lower `max_length`") as caught:
        run()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_other_errors_are_not_retried():
    calls = []

    def work():
        calls.append(0)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        SampleLimit().retry("testing", 8, work)
    assert len(calls) == 1


def test_resumed_run_takes_the_limit_over(scarce, tmp_path):
    """Else it would compute the blocks that follow in larger batches, which rounds otherwise."""
    scarce(capture, 1, 1)
    expected = run(batch_size=2, checkpoint_dir=str(tmp_path)).state_dict()
    for file in sorted(tmp_path.glob("*.safetensors"))[2:]:
        file.unlink()
    scarce(capture, 99, 1)
    got = run(batch_size=2, checkpoint_dir=str(tmp_path)).state_dict()
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items() if ".layers.2." in name)


B, L, D = 3, 5, 4
ARGUMENTS = {
    "[B, L]": ((B, L), 0),
    "[B, L, D]": ((B, L, D), 0),
    "[1, L, D]": ((1, L, D), None),
    "[3, B, L, D], B = 3": ((3, B, L, D), 1),
    "[4, B, L, D], D = L": ((4, B, L, L), 1),
    "[B, 1, L, L]": ((B, 1, L, L), 0),
    "[1, 1, L, L]": ((1, 1, L, L), None),
    "[L]": ((L,), None),
    "[B]": ((B,), 0),
    "scalar": ((), None),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_rows_of_an_argument(case):
    shape, axis = ARGUMENTS[case]
    tensor = torch.randn(shape)
    (got,) = take_samples((tensor,), slice(1, 3), B, L)
    assert torch.equal(got, tensor if axis is None else tensor.index_select(axis, torch.tensor([1, 2])))


def test_parts_of_a_block_s_run_are_its_whole(processor, make_config):
    """Every row of every batch, with its own masks and positions."""
    from sab_hf.make.plan import make_plan
    from sab_hf.passes.capture import BlockInputs

    model = build_llava()
    plan = make_plan(model, make_config(batch_size=4), processor)
    inputs = BlockInputs(model, plan.roles.blocks, plan.calibration.batches)
    block = model.get_submodule(plan.roles.blocks[0])
    (state,) = inputs.states
    (whole,) = [block_output(block, 0, piece, piece.hidden) for piece in state.pieces(0)]
    inputs.workspace.limit.samples = 3
    parts = [block_output(block, 0, piece, piece.hidden) for piece in state.pieces(0)]
    assert [part.shape[0] for part in parts] == [3, 1]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_what_a_failed_attempt_left_is_taken_back_before_the_next():
    left = []

    def work():
        left.append("gradient")
        if left == ["gradient"] and limit.samples != 2:
            raise torch.OutOfMemoryError("no memory")
        return list(left)

    limit = SampleLimit()
    assert limit.retry("testing", 8, work, left.clear) == ["gradient"]
    assert limit.samples == 2
