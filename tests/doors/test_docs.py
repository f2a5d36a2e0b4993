"""Every snippet of the user guide runs, on the small model of the repository; outputs that are marked are to the letter."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import task_data
import torch
from docs_reader import ALL_PAGES, DOCS, PAGES, ROOT, Block, anchors, links, read_page
from gguf_files import as_converted, write
from helpers import IMAGE, build_llama, build_llava, build_tokenizer, save_dense, text_config
from tiny_vlm import world
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3MoeConfig, Qwen3MoeForCausalLM

from sab_hf import SABQuantizationConfig, cli
from sab_hf.evaluate.compare import evaluate

TINY = ROOT / "examples" / "tiny_vlm" / "checkpoint"
NOT_RUN = (
    "pip install ",
    "torchrun ",
    "accelerate launch ",
    "python -m sab_hf.run transformers serve",
    "vllm serve ",
    "python -m vllm.entrypoints.openai.api_server ",
    "sab-hf serve ",
    "sab-hf chat packed --image 0.png",
    "python -m sab_hf.run lm_eval ",
    "python -m sab_hf.run -m lmms_eval ",
    "sab-hf eval packed --tasks ",
    "PYTHONPATH=examples python -m tiny_vlm.export ",
    "hf auth login",
    "llama-cli ",
    "llama-server ",
    "ollama ",
)
SHOW = bool(os.environ.get("SHOW_OUTPUTS"))
"""Whether what the commands of a page print is shown (with `pytest -s`), to write it into the page."""
NEEDS = {"fine_tune.md": "peft", "gguf.md": "gguf", "recipes.md": "peft", "walk.md": "peft"}
ELSEWHERE = {"openai": "tests/doors/test_serving.py"}
"""Modules whose snippets another test runs, against a server; that of vllm.md is run by `tests/vllm_server.py`."""


def write_materials(folder: Path, dense: Path) -> None:
    """Write what pages name into a folder: the `dense` model as `tiny`, a packed one, and questions about pictures."""
    (folder / "tiny").symlink_to(dense)
    rows = []
    for i, sample in enumerate(world.samples(8, "docs", world.VISUAL_SKILLS)):
        sample.image.save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": sample.turns[0][0], "answer": sample.answer})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SABQuantizationConfig(
        calibration=str(folder / "questions.jsonl"), num_samples=8, alternations=1, refine_steps=0, distil_steps=0
    )
    model = AutoModelForImageTextToText.from_pretrained(dense, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder / "packed")
    AutoProcessor.from_pretrained(dense).save_pretrained(folder / "packed")


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """A folder with what pages name, of a random model with the text widths of the example's, and a GGUF file of `tiny`.

    A picture is 4 of its tokens, where it is 144 of the example's.
    """
    dense = build_llava(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8
    )
    dense.generation_config.eos_token_id = list(range(128, 256))  # half of all tokens end an answer
    dense.generation_config.suppress_tokens = [IMAGE]  # else a random model may say it, where no picture is
    folder = tmp_path_factory.mktemp("materials")
    write_materials(folder, save_dense(dense, tmp_path_factory.mktemp("dense")))
    if find_spec("gguf"):
        write(folder / "tiny-F16.gguf", as_converted(dense, "model.language_model."))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The same of the example's model, which gives right answers."""
    folder = tmp_path_factory.mktemp("trained")
    write_materials(folder, TINY)
    return folder


def add_for_recipes(folder: Path, hub, monkeypatch) -> None:
    """Add what the recipes name: a model, an adapter, photographs, a data set on the hub, a mixture of experts, a text model."""
    import datasets
    from peft import LoraConfig, get_peft_model

    model = AutoModelForImageTextToText.from_pretrained(save_dense(build_llava(), folder / "small"))
    adapter = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, adapter).save_pretrained(folder / "adapter")
    (folder / "photos").mkdir()
    for i in range(2):
        shutil.copy(folder / f"{i}.png", folder / "photos")
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    for row in rows:
        row["image"] = str(folder / row["image"])
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(folder / "train.parquet")
    hub.repos["datasets/me/questions"] = [{"train.parquet": (folder / "train.parquet").read_bytes(), "README.md": b""}]
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # s after each streamed set
    (folder / "passages.jsonl").write_text("".join(f'"Passage {i} is about the number {i * i}."\n' for i in range(8)))
    for name, text_model in (("text", build_llama()), ("mixture", build_mixture())):
        text_model.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)


def build_mixture() -> Qwen3MoeForCausalLM:
    """A random mixture of four experts."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**text_config(head_dim=16).to_dict() | experts | {"model_type": "qwen3_moe"})
    )


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
def test_snippets_of_the_page_run(page, materials, hub, tmp_path, monkeypatch):
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    for item in materials.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    if page == "recipes.md":
        add_for_recipes(tmp_path, hub, monkeypatch)
    namespace: dict = {"__name__": "__main__"}
    printed = ""
    for block in read_page(page)[0]:
        if block.is_output:
            assert block.code == printed, f"{page}, line {block.line}"
        elif block.kind == "python" and not any(f"from {name} import" in block.code for name in ELSEWHERE):
            printed = run_python(block, namespace)
        elif block.kind == "bash":
            printed = run_bash(block)
            if SHOW:
                sys.stderr.write(f"== {page}, line {block.line}\n{printed}")
    if page == "walk.md":
        assert hub.files("me/tiny-sab")["model.safetensors"] == (tmp_path / "tiny-sab/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("program", "module", "changes"),
    [
        ("lm_eval", "lm_eval", {}),
        ("-m lmms_eval", "lmms_eval", {"doc_to_image": "doc_to_visual", '"<image>{{question}}"': "question"}),
    ],
)
def test_harnesses_score_as_the_package_does(program, module, changes, request, tmp_path):
    """The task of the page, with its command in a process of its own; lmms-eval needs decord as well."""
    pytest.importorskip(module)
    if module == "lmms_eval":
        pytest.importorskip("decord")
    materials = request.getfixturevalue("trained")
    blocks = read_page("evaluate.md")[0]
    task = next(block.code for block in blocks if block.kind == "yaml")
    for old, new in changes.items():
        assert old in task
        task = task.replace(old, new)
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks" / "tiny_world.yaml").write_text(task)
    pictures = next(block.code for block in blocks if "def of(row)" in block.code)
    (tmp_path / "my_tasks" / "pictures.py").write_text(pictures)
    for item in materials.iterdir():
        (tmp_path / item.name).symlink_to(item)
    command = next(block.code for block in blocks if block.code.startswith(f"python -m sab_hf.run {program} "))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"^\|tiny_world *\|.*\|exact_match\|↑ *\| *([\d.]+)\|", done.stdout, re.MULTILINE)
    expected = evaluate(str(materials / "packed"), data=str(materials / "questions.jsonl"), dtype=torch.float32)
    assert float(found[1]) == pytest.approx(expected.model.metrics["exact_match"], abs=1e-4)


@pytest.mark.slow  # lmms-eval reads all its tasks first
def test_tasks_of_the_page_are_asked(trained, tmp_path, monkeypatch, capfd):
    """The command of the page, with copies of the data on this machine."""
    pytest.importorskip("lmms_eval")
    for item in trained.iterdir():
        (tmp_path / item.name).symlink_to(item)
    task_data.write(tmp_path / "copies")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    blocks = read_page("evaluate.md")[0]
    command = next(
        line for block in blocks for line in block.code.splitlines() if line.startswith("sab-hf eval packed --tasks ")
    )
    assert cli.main([*shlex.split(command)[1:], "--data", "copies"]) == 0
    table = capfd.readouterr().out
    assert [line.split()[0] for line in table.splitlines() if line.split()[1] in ("anls", "average", "exact_match")] == [
        "docvqa_val", "textvqa_val", "mmstar",
    ]  # fmt: skip
    assert {"chartqa", "ocrbench"} <= {score["task"] for score in json.loads(Path("tasks.json").read_text())["scores"]}
    assert Path("tasks.svg").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_replacements_and_blocks_are_as_they_should_be(page):
    blocks, replacements = read_page(page)
    text = (DOCS / page).read_text(encoding="utf-8")
    for old in replacements:
        assert text.count(old) > 1, f"`{old}` is replaced but not there"
    assert {block.kind for block in blocks} <= {"python", "bash", "shell", "text", "json", "yaml"}
    for block in blocks:
        if block.kind == "shell":
            assert all(line.startswith(NOT_RUN) for line in block.code.splitlines()), block.code


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_lead_somewhere(page):
    for target, anchor in links(ROOT / page):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target), f"{target}#{anchor}"


def test_the_guide_links_every_page():
    assert {"guide.md", *(target.name for target, _ in links(DOCS / "guide.md"))} >= set(PAGES)


def test_snippets_left_to_another_test_name_one_that_exists():
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())


OTHERS_SAY = (
    "Unknown quantization type, got sab",
    "You cannot perform fine-tuning on purely quantized models",
    "You set `ignore_mismatched_sizes`",
    "Target module",
)
"""Messages of transformers and PEFT that the questions and errors quote."""


def test_messages_among_the_questions_are_those_of_the_package():
    code = "".join(path.read_text() for path in (ROOT / "sab_hf").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?r?"', "", code)  # literals that go on in the next line
    titles = re.findall(r"^\*\*(.+?)\*\*", (DOCS / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)
    quoted = [text for title in titles for text in re.findall(r'"([^"]+)"', title) if not text.startswith(OTHERS_SAY)]
    assert len(quoted) > 10
    assert [text for text in quoted if any(part.strip() not in code for part in text.split("…"))] == []
