"""SmolVLM-256M and 500M, the models that the pages begin with, are Idefics3 models: a tiny one goes through all commands."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import END, PAD, build_tokenizer, text_config
from PIL import Image
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessor, Idefics3Processor

import sab_hf
from sab_hf.cli import main

SIDE, PATCH, SCALE = 32, 8, 2
IMAGE_TOKENS = (SIDE // PATCH // SCALE) ** 2  # of a tile
TEMPLATE = (  # that of the published models
    "{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory):
    """The folder of a random SmolVLM, whose pictures are cut into tiles as those of the published ones are."""
    folder = tmp_path_factory.mktemp("smolvlm")
    tokenizer = build_tokenizer()
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)]
    names = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *names]})
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = Idefics3Config(
        text_config=text_config(vocab_size=len(tokenizer), num_hidden_layers=2).to_dict(),
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        scale_factor=SCALE,
        image_token_id=image_id,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    model = Idefics3ForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, PAD
    model.save_pretrained(folder)
    try:
        images = Idefics3ImageProcessor(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    except ImportError as error:  # some versions of transformers have it for torchvision alone
        pytest.skip(str(error).strip())
    Idefics3Processor(images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def test_all_commands(smolvlm, tmp_path, capsys):
    rows = []
    for i in range(4):
        Image.new("RGB", (48, 32), (60 * i, 90, 200 - 50 * i)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "What color?", "answer": f"Number {i}."})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, packed = str(tmp_path / "data.jsonl"), str(tmp_path / "smolvlm-sab")
    quick = ["--calibration", data, "--num-samples", "4", "--refine-steps", "0"]
    quick += ["--set", "alternations=1", "--set", "distil_steps=1"]
    assert main(["quantize", str(smolvlm), packed, *quick, "--image-tokens", str(IMAGE_TOKENS)]) == 0
    told = capsys.readouterr().err
    assert f"at most {IMAGE_TOKENS} tokens each in place of {5 * IMAGE_TOKENS}" in told
    assert "image" in told.partition("calibration set")[2].partition("\n")[0]
    assert sab_hf.load(packed)[1].image_processor.size["longest_edge"] == 2 * SIDE  # its user has all tiles
    assert main(["quantize", str(smolvlm), packed, *quick, "--image-tokens", str(IMAGE_TOKENS - 1)]) == 1
    assert f"`image_tokens` must be at least {IMAGE_TOKENS}" in capsys.readouterr().err
    assert main(["inspect", packed, "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {role for role, sizes in found["roles"].items() if sizes["num_quantized"]} == {"language"}
    assert found["coverage"]["share"] == 1.0
    ask = ["--image", str(tmp_path / "0.png"), "--prompt", "What color?", "--max-new-tokens", "4", "--json"]
    assert main(["chat", packed, *ask]) == 0
    answer = json.loads(capsys.readouterr().out)[0]["answer"]
    assert main(["eval", packed, "--original", str(smolvlm), "--data", data, "--num-samples", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kl"] > 0
    assert main(["dequantize", packed, str(tmp_path / "dense"), "--dtype", "float32"]) == 0
    capsys.readouterr()
    assert main(["chat", str(tmp_path / "dense"), *ask, "--dtype", "float32"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["answer"] == answer
    assert type(sab_hf.load(packed)[0]).__name__ == "Idefics3ForConditionalGeneration"
