"""Public tasks by name: each format's data on this machine, scores that are known, and errors that say what to do."""

from __future__ import annotations

import json
import re
import sys
from xml.etree import ElementTree

import pytest
import task_data
from helpers import build_llama, build_llava, build_processor, build_tokenizer

from sab_hf import cli
from sab_hf.evaluate import evaluate_tasks, tasks

RIGHT = {
    "chartqa": ["10.4", "20.5", "Blue", "30"],
    "docvqa": ["a", "b.", "c", "d"],
    "textvqa": ["one", "one", "one", "one"],
    "mmstar": ["A", "B.", "(C)", "D"],
    "ocrbench": ["It says one", "two", "3", "four"],
}
"""Answers to the four questions of each task that its scorer accepts."""
ENDINGS = {
    "chartqa": "with a single word.",
    "docvqa": "single word or phrase.",
    "textvqa": "single word or phrase.",
    "mmstar": "given choices directly",
    "ocrbench": "?",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return task_data.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Without the network, and with a cache of data sets of its own."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "")


@pytest.fixture
def answers(monkeypatch):
    """Let models answer from a list, by the number in the question: model → answers."""
    said = {}

    def greedy(model, encoder, prompts, max_new_tokens):
        texts = encoder.tokenizer.batch_decode(prompts["input_ids"], skip_special_tokens=False)
        assert all(text.count("<image>") == 4 for text in texts)  # one picture of 4 tokens
        return [said[id(model)][int(re.search(r"number (\d)", text)[1])] for text in texts]

    monkeypatch.setattr(tasks, "greedy", greedy)
    return said


@pytest.fixture(scope="module")
def lmms():
    pytest.importorskip("lmms_eval")


@pytest.mark.parametrize("task", task_data.TASKS)
def test_scores_are_those_of_the_task(lmms, data, answers, task):
    model, original = build_llava(), build_llava()
    answers[id(original)] = RIGHT[task]
    answers[id(model)] = [*RIGHT[task][:3], "nonsense"]
    found = evaluate_tasks(model, [task], build_processor(), original=original, data=data, batch_size=3)
    names = {"docvqa": "docvqa_val", "textvqa": "textvqa_val"}
    assert {score.task for score in found.scores} == {names.get(task, task)}
    main = "average" if task == "mmstar" else found.scores[0].metric
    score = next(score for score in found.scores if score.metric == main)
    assert score.original == 1
    assert score.model == pytest.approx(2 / 3 if task == "mmstar" else 3 / 4)  # the mean of its categories
    assert score.num_samples == task_data.NUM_ROWS
    assert score.higher_is_better
    assert "/" in score.dataset
    assert not score.dataset.startswith("/")
    if task == "chartqa":
        assert score.model_error == pytest.approx(0.25)  # of the mean of 1, 1, 1, 0
        assert [s.metric for s in found.scores] == ["relaxed_overall", "relaxed_human_split", "relaxed_augmented_split"]


def test_part_of_a_task_is_a_choice_of_the_seed(lmms, data, answers):
    model = build_llava()
    answers[id(model)] = [*RIGHT["ocrbench"][:3], "nonsense"]
    options = {"processor": build_processor(), "data": data, "num_samples": 2}
    found = [evaluate_tasks(model, ["ocrbench"], seed=seed, **options).scores[0] for seed in (1, 1, 2, 3)]
    assert [score.num_samples for score in found] == [2] * 4
    assert found[0] == found[1]
    assert {score.model for score in found} == {0.5, 1.0}  # of the 2 questions, not of the 1,000 of the whole task


def test_command_asks_both_models_and_draws(lmms, data, vlm_dir, saved, tmp_path, capfd):
    """The whole way with generation: table, JSON on stdout alone, picture, and card and report of the checkpoint."""
    options = ["--tasks", "chartqa,ocrbench", "--data", str(data), "--num-samples", "2", "--dtype", "float32"]
    files = ["--output", str(tmp_path / "tasks.json"), "--picture", str(tmp_path / "tasks.svg")]
    assert cli.main(["eval", str(saved), "--original", str(vlm_dir), *options, *files, "--json"]) == 0
    plain = json.loads(capfd.readouterr().out)
    assert plain == json.loads((tmp_path / "tasks.json").read_text())
    assert {score["task"] for score in plain["scores"]} == {"chartqa", "ocrbench"}
    assert all(score["original"] is not None for score in plain["scores"])
    assert ElementTree.parse(tmp_path / "tasks.svg").getroot().get("aria-label") == "Scores by task"
    assert cli.main(["card", str(saved), "--evaluation", str(tmp_path / "tasks.json")]) == 0
    assert json.loads((saved / "report.json").read_text())["tasks"] == plain
    assert "relaxed overall" in (saved / "report.html").read_text()
    card = (saved / "README.md").read_text()
    assert "![scores tasks](plots/scores_tasks.svg)" in card
    assert "type: lmms-lab-encoder/ChartQA" in card
    assert (saved / "plots" / "scores_tasks.svg").is_file()


@pytest.mark.slow  # lmms-eval reads all its tasks anew for each folder
def test_tasks_of_a_folder_are_run(lmms, data, answers, tmp_path):
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks" / "mine.yaml").write_text(
        "task: my_charts\ndataset_path: lmms-lab-encoder/ChartQA\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_visual: !function pictures.of\ndoc_to_text: question\ndoc_to_target: answer\n"
        "generation_kwargs: {until: [';']}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "my_tasks" / "pictures.py").write_text("def of(row):\n    return [row['image']]\n")
    model = build_llava()
    answers[id(model)] = ["10; and more", "20.5", "red", "30"]
    options = {"data": data, "include_path": tmp_path / "my_tasks"}
    assert evaluate_tasks(model, ["my_charts"], build_processor(), **options).scores[0].model == 0.75


@pytest.mark.parametrize(
    ("asked", "kind", "message"),
    [
        (["chartqq"], ValueError, r"lmms-eval has no task 'chartqq'; did you mean 'chartqa'"),
        (["nothing_like_it_at_all"], ValueError, r"lmms-eval has no task 'nothing_like_it_at_all'$"),
        (
            ["pope"],
            FileNotFoundError,
            r"must lie in `.*POPE`, and there is no such folder; get it with `hf download .*POPE",
        ),
        (["hellaswag"], ValueError, "task 'hellaswag' asks for 'multiple_choice', and only tasks that ask for answers"),
        ([], ValueError, "`tasks` must name at least one task"),
    ],
)
def test_tasks_that_cannot_be_run_say_why_before_a_model_is_opened(lmms, data, asked, kind, message):
    with pytest.raises(kind, match=message):
        evaluate_tasks("/nowhere", asked, data=data)


def test_model_without_pictures_is_refused(lmms, data):
    with pytest.raises(ValueError, match="tasks ask about pictures, and the model's processor takes none"):
        evaluate_tasks(build_llama(), ["chartqa"], build_tokenizer(), data=data)


def test_missing_program_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    assert cli.main(["eval", "some/model", "--tasks", "chartqa"]) == 1
    assert 'install it: pip install "sab_hf[tasks]"' in capsys.readouterr().err


def test_wrong_options_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, got 0"):
        evaluate_tasks("/nowhere", ["chartqa"], num_samples=0)
    assert cli.main(["eval", "some/model", "--include-path", str(tmp_path)]) == 2
    assert "--include-path: it is for --tasks" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("mine")
    assert cli.main(["eval", "some/model", "--picture", str(tmp_path / "mine.txt")]) == 1
    assert "that is no SVG picture, so it is not replaced" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["eval", "/nowhere", "--tasks", ","])
