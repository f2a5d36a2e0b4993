"""The progress bar: what it counts, and how it shows that."""

from __future__ import annotations

import copy
import io
import logging
import re

import pytest
import transformers

from sab_hf.machine import bar as bar_module
from sab_hf.machine.bar import Bar
from sab_hf.machine.clock import StageClock

SECONDS = {"capture": 10.0, "fit": 60.0, "distillation": 30.0}
RUNS = {"fit": 3}


@pytest.fixture
def drawn(monkeypatch, capsys):
    """A function that returns what was written to standard error, which is no terminal; each change is shown."""
    monkeypatch.setattr(bar_module, "LINE", 0.0)
    transformers.utils.logging.enable_progress_bar()
    return lambda: capsys.readouterr().err


def test_stages_count_by_their_seconds_and_runs():
    bar = Bar(SECONDS, RUNS)
    clock = StageClock(bar=bar)
    with clock.measure("capture"):
        assert bar.moment().share == 0
    assert bar.moment().share == pytest.approx(0.1)
    for block in range(3):
        with clock.measure("fit"):
            bar.in_block(block + 1, 3)
            for done, _ in enumerate(bar.over(range(4))):
                moment = bar.moment()
                assert moment.share == pytest.approx(0.1 + 0.2 * (block + done / 4))
                assert (moment.done, moment.total, moment.block, moment.blocks) == (done, 4, block + 1, 3)
    assert bar.moment().share == pytest.approx(0.7)
    with clock.measure("distillation"), bar.steps(100, done=50) as steps:
        steps.update(25)
        assert bar.moment().share == pytest.approx(0.7 + 0.3 * 0.75)
        assert str(bar.moment()) == "block 3/3, distillation 75/100"


def test_steps_within_steps_fill_their_part():
    bar = Bar({"sensitivity": 1.0})
    bar.enter("sensitivity")
    with bar.steps(1, part=0.1):
        for _ in bar.over(range(2)):
            pass
    assert bar.moment().share == pytest.approx(0.1)
    for _ in bar.over(range(4), part=0.4):
        with bar.steps(2) as inner:
            inner.update()
            assert bar.moment().total == 4  # what is shown are the outer steps
    assert bar.moment().share == pytest.approx(0.5)


def test_a_step_that_fails_and_is_done_again_counts_once():
    bar = Bar({"fit": 1.0})
    bar.enter("fit")
    for broken in bar.over(range(10)):
        if broken == 5:
            break
    for _ in bar.over(range(10)):
        pass
    assert bar.moment().share <= 1
    bar.leave()
    assert bar.moment().share == 1


def test_what_an_interrupted_run_did_counts_as_done():
    bar = Bar(SECONDS, RUNS)
    bar.count(("fit", "refinement"), 2)
    assert bar.moment().share == pytest.approx(0.4)
    bar.enter("fit")
    bar.leave()
    bar.count(("fit",), 3)
    assert bar.moment().share == pytest.approx(0.6)


def test_a_stage_nobody_predicted_counts_nothing():
    bar = Bar(SECONDS)
    bar.enter("written samples")
    bar.leave()
    assert bar.moment().share == 0


def test_lines_are_written_where_there_is_no_terminal(drawn):
    bar = Bar(SECONDS)
    with bar.shown():
        bar.enter("capture")
        bar.leave()
        bar.enter("distillation")
        with bar.steps(8) as steps:
            steps.note("held-out loss 0.5")
            steps.update(4)
    text = drawn()
    assert "\r" not in text
    lines = text.splitlines()
    assert all(re.match(r"binarizing: .*: +\d+ %, \d+:\d\d gone, .* left, RAM \d+\.\d GiB", line) for line in lines), (
        text
    )
    assert any("distillation 4/8:  25 %" in line and line.endswith("held-out loss 0.5") for line in lines)
    assert lines[-1].startswith("binarizing: done: 100 %")
    assert len(lines) == len(set(lines))


def test_lines_come_now_and_then(drawn, monkeypatch):
    monkeypatch.setattr(bar_module, "LINE", 1000.0)
    bar = Bar(SECONDS)
    with bar.shown():
        bar.enter("capture")
        for _ in bar.over(range(500)):
            pass
    assert len(drawn().splitlines()) == 2  # the first and the last


def test_log_lines_on_a_terminal_stand_by_themselves(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(bar_module, "REDRAW", 0.0)
    transformers.utils.logging.enable_progress_bar()
    handler = logging.StreamHandler(terminal)
    logger = logging.getLogger("sab_hf")
    logger.addHandler(handler)
    try:
        bar = Bar(SECONDS)
        with bar.shown():
            bar.enter("capture")
            logger.warning("a warning")
            bar.leave()
    finally:
        logger.removeHandler(handler)
    assert "binarizing: capture" in terminal.getvalue()
    before = terminal.getvalue().partition("a warning\n")[0]
    assert re.search(r"\r *\r?$", before), "the bar is wiped off before the line"
    assert handler not in logger.handlers


def test_a_function_gets_moments_in_place_of_a_bar(drawn):
    moments = []
    bar = Bar(SECONDS, tell=moments.append)
    with bar.shown():
        bar.enter("capture")
    assert drawn() == ""
    assert [moment.share for moment in moments] == [0, 1]
    assert moments[0].stage == "capture"
    assert moments[0].seconds_left is None
    assert moments[-1].seconds_left == 0
    assert moments[0].ram_gib > 0
    copy.deepcopy(bar)  # a model that carries its record is copied


def test_bars_can_be_turned_off(drawn):
    transformers.utils.logging.disable_progress_bar()
    try:
        with Bar(SECONDS).shown() as bar:
            bar.enter("capture")
        assert drawn() == ""
    finally:
        transformers.utils.logging.enable_progress_bar()
