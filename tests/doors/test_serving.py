"""A packed model where models are used: pipelines, batched, assisted and continuously batched generation, and over HTTP."""

from __future__ import annotations

import base64
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
import transformers
from docs_reader import read_page
from helpers import build_processor, generate, load
from PIL import Image
from transformers import GenerationConfig, pipeline

import sab_hf

ROOT = Path(sab_hf.__file__).parents[1]
PICTURE = ROOT / "examples" / "shapes.png"
EXAMPLE = ROOT / "examples" / "tiny_vlm-sab"
CAN_SERVE = importlib.util.find_spec("transformers.cli") is not None and all(
    importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "openai")
)


HAS_PAGE = importlib.util.find_spec("gradio") is not None
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def packed(packed_dir):
    return load(packed_dir)


def encode(samples):
    """Return the model inputs of the questions of samples, padded on the left."""
    processor = build_processor()
    texts = processor.apply_chat_template(
        [sample[:1] for sample in samples], tokenize=False, add_generation_prompt=True
    )
    images = [[sample[0]["content"][0]["image"]] for sample in samples]
    return dict(processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt"))


def test_pipeline_answers_as_generate(packed, samples):
    processor = build_processor()
    pipe = pipeline("image-text-to-text", model=packed, processor=processor)
    given = pipe(text=samples[0][:1], max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    inputs = encode(samples[:1])
    expected = generate(packed, inputs, 6)[inputs["input_ids"].shape[1] :]
    assert given == processor.decode(expected, skip_special_tokens=True)


def test_batched_generation_gives_each_row_its_own_answer(packed, samples):
    batch = encode(samples)
    out = packed.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :].tolist()
    for sample, answer in zip(samples, out, strict=True):
        inputs = encode([sample])
        assert generate(packed, inputs, 6)[inputs["input_ids"].shape[1] :] == answer


def test_assisted_generation_gives_the_greedy_answer(packed, packed_dir, vlm_dir, inputs):
    """A packed model as the one that is helped, and as the helper of its dense original."""
    dense = load(vlm_dir)
    for model, assistant in ((packed, load(packed_dir)), (dense, packed)):
        helped = model.generate(**inputs, assistant_model=assistant, max_new_tokens=8, do_sample=False)
        assert helped[0].tolist() == generate(model, inputs)


def test_continuous_batching_gives_the_greedy_answers(packed):
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("continuous batching of this version of transformers has no settings for its cache")
    prompts = [list(b"What is this?"), list(b"And that, there?")]
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=256, eos_token_id=-1)
    cache = transformers.ContinuousBatchingConfig(num_blocks=8, block_size=32, max_batch_tokens=64)
    out = packed.generate_batch(prompts, generation_config=config, continuous_batching_config=cache)
    for prompt, result in zip(prompts, out.values(), strict=True):
        assert result.generated_tokens == generate(packed, {"input_ids": torch.tensor([prompt])}, 5)[len(prompt) :]


@pytest.fixture(scope="module")
def served():
    """`sab-hf serve` with the example checkpoint, in a process of its own; yields the addresses of server and chat page."""
    port, page_port = free_port(), free_port()
    command = [sys.executable, "-m", "sab_hf", "serve", str(EXAMPLE), "--device", "cpu", "--port", str(port)]
    command += ["--page", "--page-port", str(page_port)] if HAS_PAGE else ["--no-page"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    told = ""
    try:
        while ("chat page: " if HAS_PAGE else "Ctrl-C ends") not in told:
            line = process.stdout.readline()
            if not line:
                pytest.fail(f"the server ended with code {process.wait()}:\n{told}")
            told += line
        assert f"serving `{EXAMPLE}` at http://127.0.0.1:{port}/v1" in told
        threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would stop it
        yield f"http://127.0.0.1:{port}/v1", f"http://127.0.0.1:{page_port}/"
    finally:
        process.terminate()
        assert process.wait(60) == 143
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)


@pytest.fixture(scope="module")
def question():
    """The example picture, a question about it, and what the example checkpoint answers."""
    from sab_hf.dialogue import Chat

    text = "What color is the object at the top left?"
    model, processor = sab_hf.load(EXAMPLE)
    return PICTURE, text, Chat(model, processor, [str(PICTURE)]).ask(text)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def server(served):
    """The address of the server's interface."""
    return served[0]


@pytest.mark.skipif(not CAN_SERVE, reason="needs `transformers serve` and pip install 'sab_hf[serve]'")
def test_openai_client_asks_about_a_picture(server, question):
    from openai import OpenAI

    picture, text, answer = question
    url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    client = OpenAI(base_url=server, api_key="not needed")
    reply = client.chat.completions.create(
        model=str(EXAMPLE), messages=[{"role": "user", "content": content}], max_tokens=20, temperature=0
    )
    assert reply.choices[0].message.content == answer


@pytest.mark.skipif(not CAN_SERVE, reason="needs `transformers serve` and pip install 'sab_hf[serve]'")
@pytest.mark.parametrize(("page", "name"), [("serve.md", "packed"), ("walk.md", "me/tiny-sab")])
def test_client_of_the_guide_gets_an_answer(page, name, server, question, tmp_path, monkeypatch, capsys):
    shutil.copy(question[0], tmp_path / "0.png")
    monkeypatch.chdir(tmp_path)
    code = next(block.code for block in read_page(page)[0] if "from openai import" in block.code)
    for old, new in (("http://localhost:8000/v1", server), (f'"{name}"', repr(str(EXAMPLE)))):
        assert old in code
        code = code.replace(old, new)
    capsys.readouterr()
    exec(compile(code, page, "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.skipif(
    not (CAN_SERVE and HAS_PAGE and CHROMIUM), reason="needs pip install 'sab_hf[serve,chat]' and chromium"
)
def test_chat_page_answers_about_a_picture(served, question, tmp_path):
    """In a browser: a picture is put beside a question, and the answer comes; a second question keeps the first in mind."""
    sync_api = pytest.importorskip("playwright.sync_api")
    picture, text, answer = question
    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 800})
        page.set_default_timeout(90_000)
        page.goto(served[1])
        page.set_input_files("input[type=file]", picture)
        page.wait_for_selector(".thumbnail-item")
        answers = page.locator("[data-testid=bot]")
        for number in range(2):
            page.fill("textarea", text)
            page.click(".submit-button")
            sync_api.expect(answers).to_have_count(number + 1, timeout=90_000)
            sync_api.expect(page.locator(".submit-button")).to_be_visible(
                timeout=90_000
            )  # a stop button while it is written
        page.screenshot(path=tmp_path / "page.png")
        assert page.locator("[data-testid=user] img").count() == 1
        assert answers.first.inner_text().strip() == answer
        assert page.locator("button[title='Copy message']:visible").count() > 0
        assert page.locator("button[title=Share]:visible").count() == 0  # pictures stay on this machine
        browser.close()
    with Image.open(tmp_path / "page.png") as shown:
        assert len(shown.convert("RGB").getcolors(2**20)) > 50  # a blank page has few


def test_missing_parts_are_named_before_a_model_is_read(monkeypatch, capsys):
    from sab_hf.cli import main

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)  # nothing is read
    found = importlib.util.find_spec
    for missing, argv, message in (
        ("vllm", ["--engine", "vllm"], '--engine vllm needs vllm: pip install "sab_hf[vllm]"'),
        ("fastapi", [], '--engine transformers needs fastapi: pip install "sab_hf[serve]"'),
        ("gradio", ["--page"], '--page needs Gradio: pip install "sab_hf[chat]"'),
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == missing else True)  # noqa: B023
        assert main(["serve", "anything", *argv]) == 1
        assert message in capsys.readouterr().err
        monkeypatch.setattr("importlib.util.find_spec", found)


def test_commands_of_the_servers(monkeypatch):
    from sab_hf.cli import make_parser
    from sab_hf.commands import serve

    def command(*argv: str) -> str:
        return " ".join(serve.command(make_parser().parse_args(["serve", "me/model", *argv])))

    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    where = "--host 127.0.0.1 --port 8000 --dtype auto"
    assert command() == f"transformers serve me/model {where}"
    more = command(
        "--engine", "vllm", "--device", "cpu", "--trust-remote-code", "--server-args", "--max-model-len", "99"
    )
    assert more == f"vllm serve me/model {where} --device cpu --trust-remote-code --max-model-len 99"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command("--trust-remote-code") == f"transformers serve --force_model me/model {where} --trust_remote_code"


def test_messages_of_the_page_alternate_between_user_and_model(tmp_path):
    """Gradio keeps a picture and the question about it as messages of their own, which some chat templates refuse."""
    from sab_hf.chat_page import conversation

    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    files = [{"role": "user", "content": [{"type": "file", "file": {"path": str(tmp_path / "red.png")}}]}] * 2
    texts = [("user", "What?"), ("assistant", "Red."), ("user", "Sure?")]
    given = files + [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts]
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    picture = {"type": "image_url", "image_url": {"url": url}}
    assert conversation(given) == [
        {"role": "user", "content": [picture, picture, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
