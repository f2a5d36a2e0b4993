"""Damage saved checkpoints at random: each must be an error, or load as the very same model, never as another in silence.

    PYTHONPATH=. python tests/fuzz_checkpoints.py --count 2000

Configs, indices and shards get bits, bytes, digits or letters changed, left out, put in or zeroed. The cases are models with
and without packed towers, embeddings and heads, in memory and offloaded to disk; files beside the weights, which
`inspect(verify=True)` reads; and checkpoints without checksums, whose damage may go unnoticed but must not crash the process.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import logging
import random
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from helpers import BLOCKS, CPU, V5, build_llama, build_llava, build_processor, build_samples, build_tokenizer, logits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

import sab_hf
from sab_hf import SABQuantizationConfig
from sab_hf.publish.inspect import inspect

DIFFERS = "another model, in silence"
LLAMA_ON_DISK = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
LLAMA_ON_DISK |= {"model.layers": "disk"}
LLAVA_ON_DISK = CPU | {BLOCKS: "disk", "model.vision_tower": "disk"}


@dataclass(frozen=True)
class Case:
    """What is damaged, and how it is looked at.

    Attributes:
        kind: "llama", "tied llama" or "llava".
        rest_bits: planes of what is outside the blocks; 16 for dense.
        device_map: for loading.
        sealed: whether it has checksums.
        beside: damage the files beside the weights, and verify.
    """

    kind: str
    rest_bits: int
    device_map: dict[str, str] | None = None
    sealed: bool = True
    beside: bool = False


CASES = {
    "llama": Case("llama", 16),
    "llava": Case("llava", 16),
    "llama, rest_bits": Case("llama", 2),  # packed embedding and head
    "tied llama, rest_bits": Case("tied llama", 2),  # a head that uses the packed embedding
    "llava, rest_bits": Case("llava", 2),  # a packed tower and projector too
    "llama, offloaded": Case("llama", 16, LLAMA_ON_DISK),
    "llama, rest_bits, offloaded": Case("llama", 2, LLAMA_ON_DISK),
    "llava, files beside the weights": Case("llava", 16, beside=True),
    "llama, no checksums": Case("llama", 2, sealed=False),
    "llama, no checksums, offloaded": Case("llama", 2, LLAMA_ON_DISK, sealed=False),
}
if V5:  # transformers 4.57 cannot offload files whose tensors it renames
    CASES["llava, rest_bits, offloaded"] = Case("llava", 2, LLAVA_ON_DISK)


# ---- ways to damage a file


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def replace(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    length = min(rng.choice((1, 2, 16)), len(data) - start)
    data[start : start + length] = rng.randbytes(length)


def delete(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 4, 64))]


def insert(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start:start] = rng.randbytes(rng.choice((1, 4)))


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def zero(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    length = min(rng.choice((4, 40, 400)), len(data) - start)
    data[start : start + length] = bytes(length)


def digit(data: bytearray, rng: random.Random) -> None:
    """Change one digit of the text: a config or header that stays well-formed."""
    places = [i for i in range(_text_end(data)) if chr(data[i]).isdigit()]
    if places:
        data[rng.choice(places)] = ord(rng.choice("0123456789"))


def letter(data: bytearray, rng: random.Random) -> None:
    """Change one letter of the text: a name that is not known any more."""
    places = [i for i in range(_text_end(data)) if chr(data[i]).isascii() and chr(data[i]).isalpha()]
    if places:
        data[rng.choice(places)] = ord(rng.choice("abcdefghijklmnopqrstuvwxyz"))


def _text_end(data: bytearray) -> int:
    """Return where text ends: the header of a safetensors file, or all of another file."""
    return min(struct.unpack("<Q", data[:8])[0] + 8, len(data)) if data[8:9] == b"{" else len(data)


DAMAGES = (flip, replace, delete, insert, truncate, zero, digit, digit, letter, letter)


# ---- one case


def build(case: Case, path: Path) -> None:
    """Quantize a model of one block and save it in several small shards, with its processor."""
    if case.kind == "llava":
        model, processor = build_llava(num_hidden_layers=1, attention_bias=True), build_processor()
        samples: list[Any] = build_samples(2)
    else:
        model = build_llama(num_hidden_layers=1, attention_bias=True, tie_word_embeddings=case.kind == "tied llama")
        processor, samples = build_tokenizer(), ["Some text.", "Other text."]
    config = SABQuantizationConfig(
        calibration=samples,
        num_samples=2,
        alternations=1,
        refine_steps=0,
        distil_steps=0,
        budget="uniform",
        rest_bits=case.rest_bits,
    )
    sab_hf.quantize(model, processor, None, config)
    sab_hf.save(model, processor, path, max_shard_size="60KB" if case.rest_bits == 16 else "5KB")
    if not case.sealed:
        content = json.loads((path / "config.json").read_text())
        content["quantization_config"]["checksums"] = None
        (path / "config.json").write_text(json.dumps(content))


def load(case: Case, path: Path) -> torch.nn.Module:
    auto = AutoModelForImageTextToText if case.kind == "llava" else AutoModelForCausalLM
    options = (
        {} if case.device_map is None else {"device_map": case.device_map, "offload_folder": str(path / "offload")}
    )
    return auto.from_pretrained(path, dtype=torch.float32, **options).eval()


def victims(case: Case, whole: Path) -> list[Path]:
    """Return the files to damage; the first one is damaged every other time."""
    if case.beside:
        names = json.loads((whole / "config.json").read_text())["quantization_config"]["checksums"]["files"]
        return [whole / name for name in sorted(names)]
    return [whole / "config.json", whole / "model.safetensors.index.json", *sorted(whole.glob("*.safetensors"))]


def fuzz(case: Case, count: int, inputs: dict[str, Tensor], folder: Path, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Damage a checkpoint `count` times; the first time nothing is changed.

    Yields:
        What was done, and "error" (or "error when it runs"), "same", DIFFERS, or "unnoticed".
    """
    whole = folder / "whole"
    build(case, whole)
    if case.kind != "llava":
        inputs = {"input_ids": torch.arange(40)[None]}
    reference = load(case, whole)
    state, expected = reference.state_dict(), logits(reference, inputs)
    files, rng = victims(case, whole), random.Random(seed)
    for i in range(count):
        victim = files[0] if i % 2 and not case.beside else rng.choice(files[not case.beside :])
        path = folder / "damaged"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for file in whole.iterdir():
            (path / file.name).symlink_to(file)
        data, change = bytearray(victim.read_bytes()), rng.choice(DAMAGES)
        if i:  # the first one stays as it is: it must load
            change(data, rng)
        (path / victim.name).unlink()
        (path / victim.name).write_bytes(data)
        try:
            if case.beside:
                inspect(path, verify=True)
                found = "same" if data == victim.read_bytes() else DIFFERS
            else:
                found = _compare(case, path, inputs, state, expected)
        except Exception:
            found = "error"
        yield f"damage {i}: {change.__name__ if i else 'nothing'} of {victim.name}", found


def _compare(case: Case, path: Path, inputs: dict[str, Tensor], state: dict[str, Tensor], expected: Tensor) -> str:
    model = load(case, path)
    try:
        found = logits(model, inputs)
    except Exception:
        return "error when it runs"
    if not case.sealed:
        return "unnoticed"
    own = model.state_dict()
    equal = own.keys() == state.keys() and all(torch.equal(own[name], t) for name, t in state.items() if not t.is_meta)
    return "same" if equal and torch.equal(found, expected) else DIFFERS


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep transformers and this package from logging thousands of times."""
    own = logging.getLogger("sab_hf")
    level = own.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    own.setLevel(logging.ERROR)
    yield
    own.setLevel(level)
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()


def image_inputs() -> dict[str, Tensor]:
    """Return a processed prompt with an image."""
    processor, sample = build_processor(), build_samples()[5]
    prompt = processor.apply_chat_template(sample[:1], tokenize=False, add_generation_prompt=True)
    return dict(processor(text=[prompt], images=[sample[0]["content"][0]["image"]], return_tensors="pt"))


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="damaged checkpoints in all (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", action="append", choices=CASES, help="only this one, with its part of the count")
    args = parser.parse_args()
    wrong, total = [], collections.Counter()
    say(f"transformers {transformers.__version__}, torch {torch.__version__}, seed {args.seed}")
    with silence():
        for index, (name, case) in enumerate(CASES.items()):
            if args.case and name not in args.case:
                continue
            count = args.count * (index + 1) // len(CASES) - args.count * index // len(CASES)
            with tempfile.TemporaryDirectory() as folder:
                results = list(fuzz(case, 1 + count, image_inputs(), Path(folder), args.seed))
            found = collections.Counter(outcome for _, outcome in results[1:])
            assert results[0][1] in ("same", "unnoticed"), results[0]
            wrong += [f"{name}: {what}" for what, outcome in results if outcome == DIFFERS]
            total += found
            say(f"{name}: {dict(sorted(found.items()))}")
    say(f"in all: {dict(sorted(total.items()))}")
    for what in wrong:
        say(what)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
