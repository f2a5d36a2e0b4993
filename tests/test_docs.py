"""Every snippet of the user guide runs, on the small model of the repository; outputs that are marked are to the letter."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from docs_reader import DOCS, PAGES, Block, links, read_page
from transformers import AutoModelForImageTextToText, AutoProcessor

import sab_hf
from sab_hf import SABQuantizationConfig, cli

ROOT = Path(sab_hf.__file__).parents[1]
TINY = ROOT / "examples" / "tiny_vlm" / "checkpoint"
NOT_RUN = (
    "pip install ",
    "torchrun ",
    "accelerate launch ",
    "python -m sab_hf.run transformers serve",
    "hf auth login",
)
NEEDS = {"fine_tune.md": "peft"}
ELSEWHERE = {"openai": "tests/test_serving.py"}
"""Modules whose snippets another test runs, against a server."""


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """A folder with what pages name: the dense model `tiny`, a packed one, questions about pictures."""
    sys.path.insert(0, str(ROOT / "examples"))
    from tiny_vlm import world

    folder = tmp_path_factory.mktemp("materials")
    (folder / "tiny").symlink_to(TINY)
    rows = []
    for i, sample in enumerate(world.samples(8, "docs", world.VISUAL_SKILLS)):
        sample.image.save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": sample.turns[0][0], "answer": sample.answer})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SABQuantizationConfig(
        calibration=str(folder / "questions.jsonl"), num_samples=8, alternations=1, refine_steps=0
    )
    model = AutoModelForImageTextToText.from_pretrained(TINY, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder / "packed")
    AutoProcessor.from_pretrained(TINY).save_pretrained(folder / "packed")
    return folder


def run_python(block: Block, namespace: dict) -> str:
    code = compile("\n" * block.line + block.code, f"line {block.line} of the page", "exec")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, namespace)
    return out.getvalue()


def run_bash(block: Block) -> str:
    """Run the commands of a block in this process, which spares a start of Python for each."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for line in block.code.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "sab-hf", line
            assert cli.main(arguments) == 0, line
    return out.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_snippets_of_the_page_run(page, materials, tmp_path, monkeypatch):
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    for item in materials.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    printed = ""
    for block in read_page(page)[0]:
        if block.is_output:
            assert block.code == printed, f"{page}, line {block.line}"
        elif block.kind == "python" and not any(f"from {name} import" in block.code for name in ELSEWHERE):
            printed = run_python(block, namespace)
        elif block.kind == "bash":
            printed = run_bash(block)


@pytest.mark.parametrize("page", PAGES)
def test_replacements_blocks_and_links_are_as_they_should_be(page):
    blocks, replacements = read_page(page)
    text = (DOCS / page).read_text(encoding="utf-8")
    for old in replacements:
        assert text.count(old) > 1, f"`{old}` is replaced but not there"
    assert {block.kind for block in blocks} <= {"python", "bash", "shell", "text", "json"}
    for block in blocks:
        if block.kind == "shell":
            assert all(line.startswith(NOT_RUN) for line in block.code.splitlines()), block.code
    for target in links(page):
        assert (DOCS / target).exists(), target


def test_the_guide_links_every_page():
    assert {"guide.md", *links("guide.md")} >= set(PAGES)


def test_snippets_left_to_another_test_name_one_that_exists():
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())
