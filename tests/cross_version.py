"""Write a packed checkpoint with one transformers version, read it with another: `python cross_version.py write|read DIR`."""

import argparse
import os
from pathlib import Path

os.environ["SAB_EXACT"] = "1"  # int8 look-ups turn the last bit, in which versions may differ, into tenths of a logit

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from sab_hf import SABQuantizationConfig

CHECKPOINT = Path(__file__).parents[1] / "examples" / "tiny_vlm" / "checkpoint"


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["write", "read"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    expected = args.folder / "expected.pt"
    if args.mode == "write":
        config = SABQuantizationConfig(num_samples=4, alternations=2, distil_steps=0)
        model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, quantization_config=config, dtype=torch.float32)
        model.save_pretrained(args.folder)
        processor = AutoProcessor.from_pretrained(CHECKPOINT)
        inputs = dict(processor(text="Which colour? <image>", images=torch.zeros(3, 96, 96), return_tensors="pt"))
        torch.save({"inputs": inputs, "logits": logits(model, inputs)}, expected)
        return
    model, loading = AutoModelForImageTextToText.from_pretrained(
        args.folder, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"], loading["missing_keys"]
    assert not loading["unexpected_keys"], loading["unexpected_keys"]
    saved = torch.load(expected, weights_only=True)
    difference = (logits(model, saved["inputs"]) - saved["logits"]).abs().max().item()
    assert difference < 1e-4, f"logits differ by {difference} from those of the other version"
    print(f"{args.folder.name}: logits within {difference:.1e} of those of the version that wrote it")


if __name__ == "__main__":
    main()
