"""The benchmark of a vision-language model with a real language model, on a random Llama: training, rows, the table."""

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from helpers import build_llama, write_texts
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]

import fidelity  # noqa: E402
import measure  # noqa: E402
import real_vlm  # noqa: E402
import runner  # noqa: E402
from runner import Job, do_job  # noqa: E402
from tiny_vlm import train as recipe  # noqa: E402
from tiny_vlm import world  # noqa: E402

TOWER = ROOT / "examples" / "tiny_vlm" / "checkpoint"
MARKS = ("<|im_start|>", "<|im_end|>")
VOCAB_SIZE, IMAGE, GROWN = 258, 258, 264


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A tied Llama, its tokenizer of one token a byte with the marks of a turn, and texts of random words beside it."""
    path = tmp_path_factory.mktemp("language")
    letters = recipe._byte_letters()
    tokenizer = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=MARKS[1], eos_token=MARKS[1])
    fast.save_pretrained(path)
    shape = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": VOCAB_SIZE, "tie_word_embeddings": True}
    build_llama(**shape, eos_token_id=257, pad_token_id=257, max_position_embeddings=1024).save_pretrained(path)
    write_texts(path, 300)
    return path


@pytest.fixture(scope="module")
def trained(language, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    short = [
        "--steps",
        "3",
        "--batch-size",
        "8",
        "--workers",
        "0",
        "--questions",
        "11",
        "--window",
        "64",
        "--windows",
        "2",
    ]
    real_vlm.main(["train", str(language), "--text", str(language), "--device", "cpu", "--output", str(folder), *short])
    return folder


@pytest.fixture(scope="module")
def rows(language, trained):
    settings = real_vlm.MixedSettings(
        str(trained), "cpu", questions=11, samples=11, batch_size=4, eval_batch=11, threads=1,
        text=str(language), length=64, window=64, windows=2, text_samples=6,
    )  # fmt: skip
    quick = {"refine_steps": 0, "distil_steps": 0, "alternations": 1, "budget": "uniform", "significance": "none"}
    jobs = [Job("full precision", "full precision"), Job("sign × scale", "sign_scale")]
    jobs += [Job("sab_hf 4", "sab_hf", bits=4.0, options=quick)]
    return [do_job(job, settings, real_vlm.do) for job in jobs]


def test_training_rows_are_what_the_processor_makes_of_a_conversation(language):
    _, _, processor = real_vlm.build_model(language, TOWER, seed=0)
    form = real_vlm.chat_format(processor.tokenizer)
    for skill in ("count", "recall"):
        sample = world.sample(random.Random(3), skill, turns=2)
        text = processor.apply_chat_template(sample.messages(), tokenize=False)
        images = None if sample.image is None else [sample.image]
        ids, answers = recipe.encode(sample, 1000, form)
        assert processor(text=[text], images=images, return_tensors="pt")["input_ids"][0].tolist() == ids
        said = processor.batch_decode([[i for i, answer in zip(ids, answers, strict=True) if answer]])[0]
        assert said == "".join(f"{answer}<|im_end|>" for _, answer in sample.turns)
        assert images is None or ids.index(IMAGE) == form.first
    with_system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = processor.apply_chat_template(with_system, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_language_model_keeps_its_logits_and_the_tower_its_weights(language):
    model, alone, _ = real_vlm.build_model(language, TOWER, seed=0)
    table = model.get_input_embeddings().weight
    assert table is model.get_output_embeddings().weight
    assert len(table) == GROWN
    torch.testing.assert_close(table[IMAGE], table[:VOCAB_SIZE].mean(0))
    ids = torch.arange(200)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[..., :VOCAB_SIZE], alone(input_ids=ids).logits)
    taken, _ = measure.load(str(TOWER), "cpu")
    for name, tensor in taken.model.vision_tower.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], tensor), name


def test_losses_are_those_of_the_models_and_both_rates_train(language):
    model, alone, processor = real_vlm.build_model(language, TOWER, seed=0)
    form = real_vlm.chat_format(processor.tokenizer)
    text = real_vlm.tokens_of(processor.tokenizer, str(language), "valid")
    batch = real_vlm.MixedBatches(1, 10, 0, form, text)[0]
    again = real_vlm.MixedBatches(1, 10, 0, form, text)[0]
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    pixels, ids, answers = batch
    ids = ids.long()
    assert (len(pixels), len(ids), int(answers[-1].sum())) == (8, 10, recipe.SEQUENCE_LENGTH)
    trainer = real_vlm.MixedTrainer(model, alone, form, 1, rate=1e-2, language_rate=1e-3, num_steps=1, compile=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[:VOCAB_SIZE] *= 1.1  # away from the model as it was
        loss, by_kind = trainer.losses(pixels, ids, answers)
        logits = model(input_ids=ids[:8], pixel_values=recipe.normalize(pixels)).logits[:, :-1]
        chosen = answers[:8, 1:]
        pictures = torch.nn.functional.cross_entropy(logits[chosen], ids[:8, 1:][chosen])
        now, before = (m(input_ids=ids[9:]).logits[:, :-1].log_softmax(-1) for m in (model, alone))
        divergence = (before.exp() * (before - now[..., :VOCAB_SIZE])).sum(-1).mean()
    torch.testing.assert_close(by_kind[0], pictures, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_kind[2], divergence, rtol=1e-3, atol=1e-5)
    assert divergence > 1e-4
    counts = answers[:8, 1:].sum(), answers[8:9, 1:].sum()
    mean = (by_kind[0] * counts[0] + by_kind[1] * counts[1]) / sum(counts)
    torch.testing.assert_close(loss, mean + by_kind[2], rtol=1e-4, atol=1e-4)

    old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.step(0, batch)
    steps = {name: float((parameter.detach() - old[name]).abs().max()) for name, parameter in model.named_parameters()}
    assert steps["model.multi_modal_projector.linear_1.weight"] == pytest.approx(1e-2, rel=0.01)  # Adam's first step
    assert steps["model.language_model.layers.0.mlp.up_proj.weight"] == pytest.approx(1e-3, rel=0.01)
    assert not any(step for name, step in steps.items() if "vision_tower" in name)


def test_the_text_must_fill_a_row(language):
    with pytest.raises(ValueError, match="at least 320 tokens, got 10"):
        real_vlm.MixedBatches(1, 8, 0, recipe.BYTES, torch.arange(10))


def test_a_trained_folder_loads_and_is_another_model(language, trained):
    model, processor = measure.load(str(trained), "cpu")
    assert model.generation_config.eos_token_id == 257
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id == IMAGE
    before = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32).model.layers[0].mlp.up_proj.weight
    assert not torch.equal(model.model.language_model.layers[0].mlp.up_proj.weight, before)


def test_rows_have_measures_of_both_modalities(rows):
    for row in rows:
        assert row["status"] == "done", row
        for key in ("nll", "visual", "text", "perplexity"):
            assert math.isfinite(row[key]), (row["label"], key)
    full, sign, ours = fidelity.compare(rows)
    assert full["bits"] == 16
    assert ours["bits"] <= 4
    assert (full["gap"], full["agreement"]) == (0, 1)
    assert abs(ours["gap"]) < abs(sign["gap"])
    errors = [abs(row["perplexity"] / full["perplexity"] - 1) for row in (ours, sign)]
    assert errors[0] < errors[1]


def test_text_has_batches_of_its_own(language, trained, monkeypatch):
    """A batch of questions as long as windows of text has logits of many GiB."""
    sizes = []
    monkeypatch.setattr(real_vlm, "measure", lambda *args: {})
    monkeypatch.setattr(
        real_vlm, "perplexity", lambda model, ids, settings: float(sizes.append(settings.eval_batch) or 1)
    )
    counts = {"questions": 2, "samples": 2, "batch_size": 2, "eval_batch": 99, "threads": 1}
    settings = real_vlm.MixedSettings(str(trained), "cpu", **counts, text=str(language), text_batch=3)
    real_vlm.do(Job("full precision", "full precision"), settings)
    assert sizes == [3]


def test_calibration_mixes_pictures_exercises_and_text(language, trained):
    _, processor = measure.load(str(trained), "cpu")
    settings = real_vlm.MixedSettings(
        str(trained),
        "cpu",
        11,
        11,
        batch_size=4,
        eval_batch=1,
        threads=1,
        text=str(language),
        length=64,
        text_samples=6,
    )
    batches = real_vlm.mixed_samples(processor, settings, 11, seed=0)
    kinds = [("pixel_values" in batch, len(batch["input_ids"])) for batch in batches]
    assert kinds == [(True, 4), (True, 4), (False, 3), (False, 4), (False, 2)]
    assert all(int((row == IMAGE).sum()) == 144 for batch in batches[:2] for row in batch["input_ids"])


def test_run_writes_json_and_table_and_full_precision_always_runs(
    language, trained, tmp_path, monkeypatch, capsys, rows
):
    ran = []

    def run_jobs(jobs, settings, work, *, report, **_):
        ran.append([job.label for job in jobs])
        known = {row["label"]: row for row in rows}
        done = [known.get(job.label) or runner._row(job, runner.NOT_RUN, reason="planted") for job in jobs]
        report(done)
        return done

    monkeypatch.setattr(runner, "run_jobs", run_jobs)
    path = tmp_path / "real.json"
    arguments = ["run", str(trained), "--text", str(language), "--device", "cpu", "--output", str(path), "--resume"]
    real_vlm.main([*arguments, "--rows", "sign"])
    real_vlm.main([*arguments, "--rows", "sign", "HQQ"])
    assert ran == [["full precision", "sign × scale"], ["full precision", "HQQ 2-bit"]]
    written = json.loads(path.read_text())
    assert [row["label"] for row in written["rows"]] == ["full precision", "sign × scale", "HQQ 2-bit"]
    assert str(language) not in json.dumps(written["settings"])
    assert not any("answers" in row for row in written["rows"])
    capsys.readouterr()
    real_vlm.main(["table", str(path)])
    shown = capsys.readouterr().out
    assert shown.startswith("| method | bits | NLL | above full precision | visual % | text % | same answers % |")
    assert f"{rows[1]['perplexity']:.4g}" in shown
    assert "HQQ 2-bit (seed 0): not run: planted" in shown
