"""Questions as training data: what is learnt, and that `Trainer` learns it on a packed model."""

from __future__ import annotations

import pytest
import torch
from helpers import END, build_processor, build_tokenizer, load

from sab_hf.tuning import IGNORED, training_data

peft = pytest.importorskip("peft")


def test_labels_are_the_answers_and_what_ends_them(samples, packed_dir):
    processor = build_processor()
    data = training_data(samples, load(packed_dir), processor, seed=3)
    assert len(data["train_dataset"]) == len(samples)
    batch = data["data_collator"](data["train_dataset"])
    for question, tokens, labels in zip(data["train_dataset"], batch["input_ids"], batch["labels"], strict=True):
        learnt = labels[labels != IGNORED]
        assert processor.decode(learnt) == f"{question.accepted[0]}<end>"
        assert torch.equal(tokens[labels != IGNORED], learnt)
        assert learnt[-1] == END
    assert batch["pixel_values"].shape[0] == len(samples)


def test_passages_pictures_and_questions_may_share_a_batch(samples, packed_dir):
    processor = build_processor()
    mixed = [samples[0], {"question": "Say 7.", "answer": "7"}, "A passage."]
    data = training_data(mixed, load(packed_dir), processor)
    batch = data["data_collator"](data["train_dataset"])
    learnt = {processor.decode(row[row != IGNORED]).removesuffix("<end>") for row in batch["labels"]}
    assert {"A box, number 0.", "7"} < learnt
    assert any("passage." in text for text in learnt)


def test_a_batch_of_one_and_a_tokenizer_alone(packed_dir):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<end>' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    data = training_data([{"question": "Say 7.", "answer": "7"}], load(packed_dir), tokenizer)
    batch = data["data_collator"](data["train_dataset"])
    assert tokenizer.decode(batch["labels"][batch["labels"] != IGNORED]) == "7<end>"
    assert tokenizer.backend_tokenizer.padding is None


def test_trainer_learns_from_them(samples, packed_dir, tmp_path):
    from transformers import Trainer, TrainingArguments

    import sab_hf.peft  # noqa: F401 (tells PEFT about packed Linears)

    torch.manual_seed(0)
    model = peft.get_peft_model(load(packed_dir), peft.LoraConfig(r=3, target_modules="all-linear"))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=3, learning_rate=2e-2, report_to=[], use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, **training_data(samples, model, build_processor()))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
