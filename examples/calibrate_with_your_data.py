"""Binarize a model on your own pictures and questions, evaluate it against its original, and save it.

Run it from a clone: `python examples/calibrate_with_your_data.py`. Without `--data` it writes a small JSONL file with pictures of
the repository's world, to show the form; with `--model` and `--data` it does the same to your model and your data.
"""

import argparse
import json
from pathlib import Path

from tiny_vlm import world
from transformers import AutoModelForImageTextToText, AutoProcessor

import sab_hf
from sab_hf import SABQuantizationConfig
from sab_hf.evaluate.compare import evaluate

TINY = Path(__file__).parent / "tiny_vlm" / "checkpoint"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY), help="folder or Hub id of a dense vision-language model")
    parser.add_argument("--data", help="JSONL file, folder or Hub dataset with image, question and answer")
    parser.add_argument("--held-out", help="the same for the evaluation; default: written beside the data")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--refine-steps", type=int, help="steps of block refinement; default: by device")
    parser.add_argument("--output", type=Path, default=Path("your_data_output"))
    args = parser.parse_args()
    if args.data is None:
        args.data = write_rows(args.output / "calibration", args.samples)
        args.held_out = write_rows(args.output / "held_out", 66)
        print(Path(args.data).read_text().splitlines()[0])

    processor = AutoProcessor.from_pretrained(args.model)
    config = SABQuantizationConfig(
        calibration=str(args.data), num_samples=args.samples, refine_steps=args.refine_steps, processor=processor
    )
    model = AutoModelForImageTextToText.from_pretrained(args.model, quantization_config=config)
    print(model.hf_quantizer.record.calibration)
    print(sab_hf.report(model))
    if args.held_out:
        print(evaluate(model, processor, str(args.held_out), original=args.model))
    checkpoint = args.output / "checkpoint"
    sab_hf.save(model, processor, checkpoint)
    print(f"saved: {checkpoint}")


def write_rows(folder: Path, count: int) -> Path:
    """Write pictures and a JSONL file with one question each; paths in it start at its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, sample in enumerate(world.samples(count, seed=folder.name)):
        row = {"question": sample.turns[0][0], "answer": sample.answer}
        if sample.image is not None:
            sample.image.save(folder / f"{i}.png")
            row["image"] = f"{i}.png"
        rows.append(json.dumps(row))
    file = folder / "samples.jsonl"
    file.write_text("\n".join(rows) + "\n")
    return file


if __name__ == "__main__":
    main()
