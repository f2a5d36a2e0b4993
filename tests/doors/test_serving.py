"""A packed model where models are used: pipelines, batched, assisted and continuously batched generation, and over HTTP."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
import transformers
from docs_reader import read_page
from helpers import build_processor, generate, load
from transformers import GenerationConfig, pipeline

import sab_hf

ROOT = Path(sab_hf.__file__).parents[1]
CAN_SERVE = importlib.util.find_spec("transformers.cli") is not None and all(
    importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "openai")
)


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
def server(packed_dir):
    """`transformers serve` started by `sab_hf.run` in a process of its own; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sab_hf.run", "transformers", "serve", str(packed_dir)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        for _ in range(240):
            if process.poll() is not None:
                pytest.fail(f"the server ended with code {process.returncode}:\n{process.stdout.read()}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.skipif(not CAN_SERVE, reason="needs `transformers serve` and pip install 'sab_hf[serve]'")
def test_openai_client_asks_about_a_picture(server, packed, packed_dir, samples):
    from openai import OpenAI

    image, question = (part[kind] for part, kind in zip(samples[1][0]["content"], ("image", "text"), strict=True))
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    client = OpenAI(base_url=server, api_key="not needed")
    reply = client.chat.completions.create(
        model=str(packed_dir), messages=[{"role": "user", "content": content}], max_tokens=6, temperature=0
    )
    inputs = encode(samples[1:2])
    start = inputs["input_ids"].shape[1]
    expected = build_processor().decode(generate(packed, inputs, 6)[start:], skip_special_tokens=True)
    assert reply.usage.prompt_tokens == start
    assert reply.choices[0].message.content == expected


@pytest.mark.skipif(not CAN_SERVE, reason="needs `transformers serve` and pip install 'sab_hf[serve]'")
@pytest.mark.parametrize(("page", "name"), [("serve.md", "packed"), ("walk.md", "me/tiny-sab")])
def test_client_of_the_guide_gets_an_answer(page, name, server, packed_dir, samples, tmp_path, monkeypatch, capsys):
    samples[0][0]["content"][0]["image"].save(tmp_path / "0.png")
    (tmp_path / "packed").symlink_to(packed_dir)
    monkeypatch.chdir(tmp_path)
    code = next(block.code for block in read_page(page)[0] if "from openai import" in block.code)
    for old, new in (("http://localhost:8000/v1", server), (f'"{name}"', repr(str(packed_dir)))):
        assert old in code
        code = code.replace(old, new)
    capsys.readouterr()
    exec(compile(code, page, "exec"), {})
    assert capsys.readouterr().out.strip()
