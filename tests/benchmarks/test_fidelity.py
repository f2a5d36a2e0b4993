"""The fidelity benchmark on the shipped model: rows, bits, JSON, what happens to rows that do not run."""

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]

import ablation  # noqa: E402
import fidelity  # noqa: E402
import runner  # noqa: E402
import tables  # noqa: E402
from methods import do, floor_bits  # noqa: E402
from planted_jobs import fail_or_wait  # noqa: E402
from runner import Job, Settings, circumstances, do_job, write_json  # noqa: E402

CHECKPOINT = str(ROOT / "examples" / "tiny_vlm" / "checkpoint")
SETTINGS = Settings(CHECKPOINT, "cpu", questions=11, samples=11, batch_size=4, eval_batch=11, threads=1)


@pytest.fixture(scope="module")
def rows():
    quick = {"significance": "paper", "budget": "uniform", "alternations": 1, "refine_steps": 0, "distil_steps": 0}
    jobs = [
        Job("full precision", "full precision"),
        Job("sign × scale", "sign_scale"),
        Job("sab_hf", "sab_hf", bits=1.2, options=quick),
    ]
    return [do_job(job, SETTINGS, do) for job in jobs]


def test_rows_have_finite_measures_and_the_bits_of_their_format(rows):
    for row in rows:
        assert row["status"] == "done", row
        for key in ("nll", "visual", "text", "text_nll", "text_perplexity"):
            assert math.isfinite(row[key]), (row["label"], key)
        assert len(row["accuracy"]) == len(row["nll_by_skill"]) == 11
    full, sign, ours = rows
    assert full["bits"] == 16  # the checkpoint is bfloat16
    assert sign["bits"] == pytest.approx(1 + 16 / 128)
    assert floor_bits(CHECKPOINT) <= ours["bits"] <= 1.2
    assert full["nll"] < ours["nll"] < sign["nll"]


def test_rows_are_compared_with_full_precision_question_by_question(rows):
    with_agreement = fidelity.compare(rows)
    assert with_agreement[0]["agreement"] == 1
    assert all(0 <= row["agreement"] <= 1 and "answers" not in row for row in with_agreement)
    assert with_agreement[0]["gap"] == with_agreement[0]["gap_error"] == 0
    assert with_agreement[1]["gap"] == pytest.approx(rows[1]["nll"] - rows[0]["nll"])
    total, gap = sum(rows[1]["tokens"]), with_agreement[1]["gap"]
    differences = [a - b for a, b in zip(rows[1]["losses"], rows[0]["losses"], strict=True)]
    assert sum(differences) / total == pytest.approx(gap)
    spread = sum((d - gap * n) ** 2 for d, n in zip(differences, rows[1]["tokens"], strict=True))
    assert with_agreement[1]["gap_error"] == pytest.approx(spread**0.5 / total)
    made_up = [dict(rows[0]), dict(rows[1], answers=["?"] * 11)]
    assert fidelity.compare(made_up)[1]["agreement"] == 0


def test_json_names_command_machine_versions_and_rows(rows, tmp_path):
    path = tmp_path / "results.json"
    write_json(path, circumstances(SETTINGS), fidelity.compare(rows))
    written = json.loads(path.read_text())
    assert written.keys() == {"command", "date", "machine", "versions", "settings", "rows"}
    assert written["versions"]["torch"]
    assert [row["label"] for row in written["rows"]] == [row["label"] for row in rows]
    assert {"bits", "nll", "agreement", "seconds", "peak_mib", "seed"} <= written["rows"][2].keys()


def test_resume_keeps_what_is_done_and_refuses_other_settings(rows, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    arguments = ["--model", CHECKPOINT, "--device", "cpu", "--questions", "11", "--samples", "11", "--batch-size", "4"]
    arguments += ["--eval-batch", "11", "--resume", "--output", str(path), "--only", "full", "sign", "HQQ 1"]
    write_json(path, circumstances(SETTINGS) | {"date": "2026-01-01"}, fidelity.compare(rows))
    ran = []

    def run_jobs(jobs, settings, work, *, report, **_):
        ran.extend(job.label for job in jobs)
        done = [rows[0], *(runner._row(job, runner.NOT_RUN, reason="planted") for job in jobs[1:])]
        report(done)
        return done

    monkeypatch.setattr(runner, "run_jobs", run_jobs)
    fidelity.main(arguments)
    assert ran == ["full precision", "HQQ 1-bit"]  # the first gives what others are compared with
    written = {row["label"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(written) == [
        "full precision",
        "sign × scale",
        "HQQ 1-bit",
        "sab_hf",
    ]  # what no row of this run is stays
    assert written["sign × scale"]["nll"] == rows[1]["nll"]
    with pytest.raises(SystemExit, match="other settings"):
        fidelity.main([*arguments, "--samples", "12"])


def test_job_list_has_every_method_budget_and_seed():
    options = {"refine_steps": 3}
    jobs = fidelity.list_jobs(1.0531, (0, 1), options, ", refined")
    assert jobs[0].method == "full precision"
    assert {job.method for job in jobs} >= set(fidelity.BASELINE_LABELS) | set(fidelity.PACKAGES)
    own = {seed: [job for job in jobs if job.method == "sab_hf" and job.seed == seed] for seed in (0, 1)}
    every = [1.0531, 1.1, 1.2, 1.35, 1.6, 2.1, 3.1]
    assert [job.bits for job in own[0]] == [*every, 1.1, 2.1]
    assert [job.bits for job in own[1]] == [1.1, 1.35, 2.1, 3.1]
    assert [job.options for job in own[0]] == [options] * 7 + [{"refine_steps": 3, "rest_bits": 4}] * 2
    assert own[0][1].label == "sab_hf 1.1, refined"
    assert own[0][-1].label == "sab_hf 2.1, all else at 4 bits, refined"
    assert {job.method for job in jobs if job.seed == 1} >= set(fidelity.BASELINE_LABELS)
    assert len({(job.label, job.seed) for job in jobs}) == len(jobs)
    merged = [job for job in fidelity.list_jobs(1.15, (0,), {}) if job.method == "sab_hf"]
    assert len(merged) == 8  # two budgets merge


def test_ablation_names_are_unique_and_unknown_fields_are_named():
    jobs = ablation.list_jobs(CHECKPOINT, 1.15, (0,))
    assert len({job.label for job in jobs}) == len(jobs)
    row = do_job(Job("x", "sab_hf", bits=1.2, options={"no_such_field": 1}), SETTINGS, do)
    assert row["status"] == "not run"
    assert "no_such_field" in row["reason"]


def test_table_gives_mean_and_spread_over_seeds_and_names_what_did_not_run(rows):
    a, b = (dict(rows[1], seed=seed, nll=nll) for seed, nll in ((0, 1.0), (1, 3.0)))
    missing = runner._row(Job("HQQ 1-bit", "HQQ 1-bit"), runner.NOT_RUN, reason="`hqq` does not import")
    table = tables.markdown([a, b, missing], fidelity.COLUMNS)
    assert "2 ± 1.4" in table
    assert "HQQ 1-bit (seed 0): not run: `hqq` does not import" in table


def _run(labels, budget):
    reports = []
    jobs = [Job(label, "full precision") for label in labels]
    rows = runner.run_jobs(jobs, SETTINGS, fail_or_wait, num_workers=1, budget=budget, report=reports.append)
    return rows, len(reports)


def test_run_jobs_survives_a_failure():
    rows, reports = _run(["fails", "short"], budget=math.inf)
    assert [row["status"] for row in rows] == ["failed", "done"]
    assert "planted" in rows[0]["reason"]
    assert reports == 3  # one after each row, one at the end


def test_run_jobs_stops_at_the_budget_and_names_what_it_left():
    rows, _ = _run(["long", "last"], budget=0.5)
    assert [row["status"] for row in rows] == ["not run", "not run"]
    assert "stopped" in rows[0]["reason"]
    assert "before" in rows[1]["reason"]
