"""Write samples of the generated world as a data set: pictures, and a JSONL file of questions and answers.

PYTHONPATH=examples python -m tiny_vlm.export calibration_data --samples 512 --seed calibration
"""

import argparse
import json
from pathlib import Path

from . import world


def export(folder: Path, num_samples: int, seed: str) -> Path:
    """Write `num_samples` samples into `folder` and return the JSONL file; paths in it are relative to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, sample in enumerate(world.samples(num_samples, seed)):
        question, answer = sample.turns[0]
        row = {"question": question, "answer": answer}
        if sample.image is not None:
            row["image"] = f"{i:05}.png"
            sample.image.save(folder / row["image"])
        rows.append(json.dumps(row))
    file = folder / "data.jsonl"
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


def main() -> None:
    """Run the module as a script."""
    parser = argparse.ArgumentParser(prog="python -m tiny_vlm.export", description="Export samples of the world.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seed", default="calibration")
    args = parser.parse_args()
    print(export(args.folder, args.samples, args.seed))


if __name__ == "__main__":
    main()
