"""Evaluation of a model and its original, against the same quantities computed one sample at a time."""

from __future__ import annotations

import base64
import io
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import build_llama, build_llava, build_processor, build_samples, build_tokenizer, load
from PIL import Image

from sab_hf.evaluate.compare import Evaluation, Scores, evaluate
from sab_hf.evaluate.questions import read_questions
from sab_hf.evaluate.scorers import normalize
from sab_hf.machine import threads


@pytest.fixture(scope="module")
def models(packed_dir, vlm_dir):
    return load(packed_dir), load(vlm_dir)


def one_by_one(model, original, samples):
    """Return nll, KL and token agreement over the answers, unpadded, from whole logits."""
    processor = build_processor()
    nll, kl, same, count = 0.0, 0.0, 0, 0
    for sample in samples:
        image = [sample[0]["content"][0]["image"]]
        texts = [
            processor.apply_chat_template(part, tokenize=False, add_generation_prompt=reply)
            for part, reply in ((sample[:1], True), (sample, False))
        ]
        prompt, whole = (processor(text=[text], images=image, return_tensors="pt") for text in texts)
        start, ids = prompt["input_ids"].shape[1], whole["input_ids"][0]
        with torch.no_grad():
            log_q, log_p = (m(**whole).logits[0, start - 1 : -1].log_softmax(-1) for m in (model, original))
        nll -= log_q.gather(-1, ids[start:, None]).sum().item()
        kl += torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
        same += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
        count += len(ids) - start
    return nll / count, kl / count, same / count, count


@pytest.mark.parametrize("batch_size", [1, 4])
def test_token_scores_are_those_of_single_samples(models, samples, batch_size):
    model, original = models
    nll, kl, same, count = one_by_one(model, original, samples)
    result = evaluate(model, build_processor(), samples, original=original, batch_size=batch_size, max_new_tokens=2)
    assert result.num_tokens == count
    assert result.model.nll == pytest.approx(nll, rel=1e-5)
    assert result.model.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert result.kl == pytest.approx(kl, rel=1e-4)
    assert result.token_agreement == pytest.approx(same)


def test_answers_are_greedy_and_scored_in_batches(models, samples):
    model, _ = models
    processor = build_processor()
    result = evaluate(model, processor, samples, batch_size=4, max_new_tokens=6)
    assert len(result.answers) == len(samples)
    for answer in result.answers:
        sample = next(s for s in samples if s[0]["content"][1]["text"] == answer.question)
        prompt = processor.apply_chat_template(sample[:1], tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[prompt], images=[sample[0]["content"][0]["image"]], return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert answer.given == processor.batch_decode(out, skip_special_tokens=True)[0].strip()
        assert answer.accepted == (sample[1]["content"][0]["text"],)
    said = {answer.question: answer.given for answer in result.answers}
    rows = [
        {"image": s[0]["content"][0]["image"], "question": s[0]["content"][1]["text"], "answers": ["nonsense", said_it]}
        for s in samples
        if (said_it := said[s[0]["content"][1]["text"]])
    ]
    assert rows
    again = evaluate(model, processor, rows, batch_size=4, max_new_tokens=6)
    assert again.model.metrics == {"exact_match": 1.0, "anls": 1.0, "relaxed_accuracy": 1.0}


def test_a_model_agrees_with_itself_by_path(packed_dir, samples):
    result = evaluate(packed_dir, data=samples, original=str(packed_dir), max_new_tokens=3, dtype=torch.float32)
    assert (result.answer_agreement, result.token_agreement) == (1.0, 1.0)
    assert result.kl == 0.0
    assert result.model == result.original
    plain = json.loads(result.to_json())
    assert plain["model"]["perplexity"] == result.model.perplexity
    assert "KL to original, nats" in str(result)
    assert f"{len(samples)} questions and 0 passages" in str(result)


def test_options_of_the_hub_hold_for_config_and_processor_and_not_for_the_original(
    packed_dir, vlm_dir, samples, tmp_path
):
    shutil.copytree(packed_dir, tmp_path / "inner")
    options = {"max_new_tokens": 2, "dtype": torch.float32}
    result = evaluate(tmp_path, data=samples[:2], original=vlm_dir, subfolder="inner", **options)
    assert result == evaluate(packed_dir, data=samples[:2], original=vlm_dir, **options)


def test_json_has_null_for_what_is_no_number():
    result = Evaluation("mine", 1, 1, 0, 1, Scores({}, math.nan), Scores({}, 1e9), kl=math.inf)
    plain = json.loads(result.to_json(), parse_constant=pytest.fail)
    assert plain["model"] == {"metrics": {}, "nll": None, "perplexity": None, "speed": None}
    assert (plain["original"]["perplexity"], plain["kl"]) == (None, None)


def test_speed_is_that_of_one_answer(models, samples, monkeypatch):
    """A model whose time is counted in tokens: 5 ms before the first, 2 ms for each, and what other programs add to some runs."""
    clock, lengths = [0.0], []
    generate = type(models[0]).generate

    def timed(self, *args, max_new_tokens, **kwargs):
        if "min_new_tokens" in kwargs:
            lengths.append((kwargs["input_ids"].shape[0], max_new_tokens, kwargs["min_new_tokens"]))
            clock[0] += 0.005 + 0.002 * max_new_tokens + (len(lengths) // 2 % 3 > 0) * 0.1 * (max_new_tokens == 1)
        return generate(self, *args, max_new_tokens=1, **{k: v for k, v in kwargs.items() if k != "min_new_tokens"})

    monkeypatch.setattr(type(models[0]), "generate", timed)
    monkeypatch.setattr("sab_hf.evaluate.answering.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    result = evaluate(models[0], build_processor(), samples[:2], original=models[1], max_new_tokens=1)
    for speed in (result.model.speed, result.original.speed):
        assert (speed.first_token_ms, speed.token_ms) == (pytest.approx(7), pytest.approx(2))
        assert speed.prompt_tokens > 4
        assert speed.device.startswith("CPU")
    assert set(lengths) == {(1, 1, 1), (1, 17, 17)}
    assert "further token, ms" in str(result)
    assert evaluate(models[0], build_processor(), samples[:2], max_new_tokens=1, speed=False).model.speed is None


def test_evaluation_takes_the_free_cores_only(models, samples, monkeypatch):
    """On a machine of eight cores, seven of them busy; what the speed was measured with is said."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_bound", lambda: list(range(8)))
    monkeypatch.setattr(threads, "look", lambda: threads.Cores(8, 7, 7))
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        result = evaluate(models[0], build_processor(), samples[:1], max_new_tokens=1)
        assert torch.get_num_threads() == 8
    finally:
        torch.set_num_threads(before)
    assert result.model.speed.device == "CPU, 1 of 8 cores"


def test_examples_are_the_first_questions_with_pictures(models, samples, tmp_path):
    answers = evaluate(models[0], build_processor(), samples[:4], max_new_tokens=4, speed=False, seed=3).answers
    said = {answer.question: answer.given for answer in answers}
    text = "Who has no picture?"
    rows = [
        {"image": picture["image"], "question": question["text"], "answer": said[question["text"]] or "nothing"}
        for picture, question in (sample[0]["content"] for sample in samples[:4])
    ]
    rows[1]["answer"] = "something else"
    result = evaluate(
        models[0], build_processor(), [{"question": text, "answer": "I"}, *rows], max_new_tokens=4, num_examples=3, seed=3,
        original=models[1], speed=False,
    )  # fmt: skip
    assert len(result.examples) == 3
    by_question = {row["question"]: row for row in rows}
    for example in result.examples:
        row = by_question[example.question]
        assert example.right == (normalize(said[example.question]) == normalize(row["answer"]))
        assert example.original_right is not None
        picture = Image.open(io.BytesIO(base64.b64decode(example.picture))).convert("RGB")
        assert picture.size == row["image"].size
    assert [example.question for example in result.examples] == [
        question.text
        for question in read_questions([{"question": text, "answer": "I"}, *rows], 200, 3, with_images=True)
        if question.text != text
    ][:3]
    assert evaluate(models[0], build_processor(), rows, max_new_tokens=1, speed=False).examples == []


def test_passages_count_for_perplexity_only():
    model, tokenizer = build_llama(), build_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}user: {{ message['content'] }}<end>{% endfor %}"
    texts = ["A short passage.", "Another one, which is longer."]
    result = evaluate(model, tokenizer, texts, batch_size=2, original=model)
    encoded = [tokenizer(f"user: {text}<end>", return_tensors="pt")["input_ids"] for text in texts]
    with torch.no_grad():
        losses = [(model(ids, labels=ids).loss.item(), ids.shape[1] - 1) for ids in encoded]
    assert result.model.nll == pytest.approx(sum(a * n for a, n in losses) / sum(n for _, n in losses), rel=1e-5)
    assert (result.num_questions, result.num_samples) == (0, 2)
    assert result.model.metrics == {}
    assert result.answer_agreement is None


def test_results_do_not_depend_on_training_mode_and_leave_it(models, samples):
    model, _ = models
    processor = build_processor()
    before = processor.tokenizer.backend_tokenizer.to_str()
    first = evaluate(model, processor, samples, num_samples=3, max_new_tokens=2)
    model.train()
    second = evaluate(model, processor, samples, num_samples=3, max_new_tokens=2)
    assert model.training
    model.eval()
    assert first == second
    assert first.num_samples == 3
    assert processor.tokenizer.backend_tokenizer.to_str() == before


def test_errors_say_what_to_do(models):
    model, _ = models
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        evaluate(model, build_processor(), build_samples(1), batch_size=0)
    with pytest.raises(ValueError, match="`num_examples` must be at least 0, got -1"):
        evaluate(model, build_processor(), build_samples(1), num_examples=-1)
    with pytest.raises(ValueError, match="must hold at least one sample"):
        evaluate(model, build_processor(), [])
    with pytest.raises(
        ValueError, match="evaluation needs the model's processor, and none could be loaded from ''; pass `processor`"
    ):
        evaluate(build_llava(), None, build_samples(1))
    with pytest.raises(ValueError, match="key 'answers' must be a list of at least one string"):
        evaluate(model, build_processor(), [{"question": "How?", "answers": []}])
    other = build_llava(vocab_size=300)
    with pytest.raises(ValueError, match="must have one vocabulary, got 264 and 300"):
        evaluate(model, build_processor(), build_samples(1), original=other, max_new_tokens=1)


def test_a_seed_out_of_range_is_refused_before_the_model_is_opened(tmp_path):
    with pytest.raises(ValueError, match=rf"`seed` must be .* at most {2**63 - 1}, got {2**70}"):
        evaluate(tmp_path / "nowhere", seed=2**70)
