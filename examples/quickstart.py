"""Binarize a small vision-language model while it loads, look at its answers, save it packed, load it back.

Run it from a clone: `python examples/quickstart.py`. It needs no network and no GPU: the model and its test questions are
in `examples/tiny_vlm`.
"""

import argparse
import textwrap
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tiny_vlm import score, world
from transformers import AutoModelForImageTextToText, AutoProcessor

import sab_hf
from sab_hf import SABQuantizationConfig

CHECKPOINT = Path(__file__).parent / "tiny_vlm" / "checkpoint"
SHOWN_SKILLS = ("color", "read", "chart")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart_output"), help="folder for picture and checkpoint"
    )
    parser.add_argument(
        "--bits",
        type=float,
        help="stored bits per language weight; default: what one plane and a tenth of the columns take",
    )
    parser.add_argument("--questions", type=int, default=220, help="questions that the accuracy is measured on")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    questions = world.samples(args.questions, seed="quickstart")
    shown = [sample for skill in SHOWN_SKILLS for sample in world.samples(1, seed="shown", skills=(skill,))]
    answers = {}

    print("1. The model as it is")
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32)
    dense_bytes = sum(p.numel() for p in model.parameters()) * 2
    print(f"   {dense_bytes / 2**20:.2f} MiB in bfloat16; {accuracy(model, processor, questions)}")
    answers["as it is, 16 bits"] = [answer(model, processor, sample) for sample in shown]

    print("2. Binarized while it loads")
    # This model knows its small world only, so it is calibrated on pictures and questions of that world, as you would
    # calibrate on data like yours. Without `calibration`, the package draws and writes a general set.
    calibration = [sample.messages() for sample in world.samples(512, seed="calibration")]
    start = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(
        CHECKPOINT,
        quantization_config=SABQuantizationConfig(bits=args.bits, calibration=calibration),
        dtype=torch.float32,
    )
    report = sab_hf.report(model)
    print(f"   {time.perf_counter() - start:.0f} s; {report.bits:.3f} bits per language weight, everything counted")
    print(f"   {accuracy(model, processor, questions)}")
    answers[f"binarized, {report.bits:.2f} bits"] = [answer(model, processor, sample) for sample in shown]
    print(textwrap.indent(str(report), "   "))

    picture = args.output / "answers.png"
    draw_answers(shown, answers).save(picture)
    print(f"   answers to three pictures: {picture}")

    print("3. Saved packed, loaded back")
    checkpoint = args.output / "checkpoint"
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    reloaded = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    inputs = encode(processor, shown[0])
    with torch.no_grad():
        equal = torch.equal(model(**inputs).logits, reloaded(**inputs).logits)
    if not equal:
        raise SystemExit("   the reloaded model differs")
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    print(f"   {checkpoint}: {size / 2**20:.2f} MiB of weights; logits bitwise equal after loading: {equal}")


def encode(processor, sample):
    """Return the model inputs of a sample's question."""
    return processor.apply_chat_template(
        sample.messages(with_answer=False),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def answer(model, processor, sample) -> str:
    """Return the model's greedy answer to a sample's question."""
    inputs = encode(processor, sample)
    tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(model, processor, questions) -> str:
    """Return the accuracy of the model on the questions, as words."""
    result = score.evaluate(model, processor, questions)
    return (
        f"right answers: {result.visual:.0%} about pictures, {result.text:.0%} text only; "
        f"{result.mean_nll:.3f} nats per answer token"
    )


def draw_answers(samples, answers) -> Image.Image:
    """Draw pictures with question, right answer and the answers of each model under them."""
    scale, margin, font = 3, 20, ImageFont.load_default(16)
    side = world.IMAGE_SIZE * scale
    height = side + 3 * margin + 24 * (3 + len(answers))
    sheet = Image.new("RGB", (margin + len(samples) * (side + margin), height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, sample in enumerate(samples):
        x = margin + i * (side + margin)
        sheet.paste(sample.image.resize((side, side), Image.Resampling.NEAREST), (x, margin))
        lines = textwrap.wrap(sample.turns[-1][0], 34)
        rows = [(line, "black") for line in [*lines, ""][:2]] + [(f"right: {sample.answer}", "black")]
        for name, given in answers.items():
            rows.append((f"{name}: {given[i]}", "darkgreen" if given[i].strip() == sample.answer else "firebrick"))
        for row, (text, colour) in enumerate(rows):
            draw.text((x, side + 2 * margin + 24 * row), text, fill=colour, font=font)
    return sheet


if __name__ == "__main__":
    main()
