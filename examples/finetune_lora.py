"""Binarize the small model to one plane with the fit alone, then train a LoRA adapter to win back what that lost.

Run it from a clone: `python examples/finetune_lora.py`. It needs PEFT (`pip install -e ".[peft]"`), no network and no GPU.
"""

import argparse
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_vlm import score, world
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import sab_hf.peft  # tells PEFT about packed Linears
from sab_hf import SABQuantizationConfig

CHECKPOINT = Path(__file__).parent / "tiny_vlm" / "checkpoint"
ONE_PLANE = 1.12  # bits per weight of this model with one plane everywhere, scales included


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("finetune_output"), help="folder for checkpoint and adapter"
    )
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of 16 samples")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapter")
    parser.add_argument("--calibration", type=int, default=128, help="calibration samples")
    parser.add_argument(
        "--questions", type=int, default=220, help="held-out questions that the accuracy is measured on"
    )
    args = parser.parse_args()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    questions = world.samples(args.questions, seed="held-out")

    packed = args.output / "packed"
    calibration = [sample.messages() for sample in world.samples(args.calibration, seed="calibration")]
    config = SABQuantizationConfig(
        bits=ONE_PLANE, calibration=calibration, num_samples=args.calibration, refine_steps=0, distil_steps=0
    )
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(packed)
    processor.save_pretrained(packed)
    print(f"one plane, {sab_hf.report(model).bits:.3f} bits per weight: {accuracy(model, processor, questions)}")

    model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"))
    trainable, total = model.get_nb_trainable_parameters()
    print(f"adapter of rank {args.rank}: {trainable:,} trainable parameters beside {total - trainable:,} stored ones")
    start = time.perf_counter()
    trainer = Trainer(
        model,
        TrainingArguments(
            str(args.output / "trainer"),
            max_steps=args.steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 20,
            save_strategy="no",
            logging_steps=max(1, args.steps // 5),
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to=[],
            seed=0,
        ),
        train_dataset=world.samples(16 * args.steps, seed="fine-tuning"),
        data_collator=lambda samples: collate(processor, samples),
    )
    trainer.train()
    model.save_pretrained(args.output / "adapter")
    print(f"after {args.steps} steps, {time.perf_counter() - start:.0f} s: {accuracy(model, processor, questions)}")

    base, processor = sab_hf.load(packed, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, args.output / "adapter")
    print(f"adapter loaded on the packed checkpoint: {accuracy(model, processor, questions)}")


def collate(processor, samples):
    """Return a batch in which the answers, and what ends them, are the labels. Pictures and plain text may be mixed."""
    texts = [processor.apply_chat_template(sample.messages(), tokenize=False) for sample in samples]
    images = [sample.image for sample in samples if sample.image is not None] or None
    batch = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, sample in zip(labels, samples, strict=True):
        answer = len(processor.tokenizer(f"{sample.answer}<end>")["input_ids"])
        end = int((row != -100).sum())
        row[: end - answer] = -100
    return {**batch, "labels": labels}


def accuracy(model, processor, questions) -> str:
    """Return the accuracy of a model on questions, as words."""
    result = score.evaluate(model, processor, questions)
    return (
        f"{result.visual:.0%} of questions about pictures and {result.text:.0%} of text-only questions right; "
        f"{result.mean_nll:.3f} nats per answer token"
    )


if __name__ == "__main__":
    main()
