"""`sab-hf chat`: one answer, questions from a pipe, and a conversation at a terminal."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import build_llama, build_processor, build_tokenizer, generate, load
from PIL import Image

import sab_hf
from sab_hf.cli import main
from sab_hf.commands import chat as command
from sab_hf.dialogue import Chat

ROOT = Path(sab_hf.__file__).parents[1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pictures")
    for color in ("red", "blue"):
        Image.new("RGB", (16, 16), color).save(folder / f"{color}.png")
    return {color: str(folder / f"{color}.png") for color in ("red", "blue")}


def user(text: str, *images: str) -> dict:
    parts = [{"type": "image", "path": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def expected(model, messages: list[dict], num_tokens: int) -> str:
    """Return the greedy answer to a conversation, made without the class under test."""
    processor = build_processor()
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = generate(model, dict(inputs), num_tokens)[inputs["input_ids"].shape[1] :]
    return processor.decode(tokens, skip_special_tokens=True).strip()


# ---- the class


def test_conversation_has_pictures_and_history(packed_dir, pictures):
    model = load(packed_dir)
    chat = Chat(model, build_processor(), [pictures["red"], pictures["blue"]], max_new_tokens=4)
    said = []
    first = chat.ask("Which are these?", said.append)
    begin = [user("Which are these?", pictures["red"], pictures["blue"])]
    assert first == expected(model, begin, 4)
    assert "".join(said).strip() == first
    chat.show(pictures["red"])
    second = chat.ask("And this?")
    begin += [{"role": "assistant", "content": [{"type": "text", "text": first}]}, user("And this?", pictures["red"])]
    assert second == expected(model, begin, 4)
    chat.reset()
    assert chat.ask("Which are these?") == expected(model, [user("Which are these?")], 4)


def test_what_was_said_before_an_interruption_is_remembered(packed_dir):
    chat = Chat(load(packed_dir), build_processor(), max_new_tokens=40)

    def stop(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("What is this?", stop)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert chat.messages[1]["content"][0]["text"]


def test_a_question_that_failed_is_forgotten(packed_dir, monkeypatch):
    chat = Chat(load(packed_dir), build_processor())
    monkeypatch.setattr(chat.model, "generate", None)
    with pytest.raises(TypeError):
        chat.ask("What is this?")
    assert chat.messages == []


def test_text_models_and_models_without_a_template(pictures):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}user: {{ message['content'] }}<end>{% endfor %}"
    chat = Chat(build_llama(), tokenizer, max_new_tokens=3)
    assert chat.messages == []
    chat.ask("Hello")
    assert chat.messages[0] == {"role": "user", "content": "Hello"}
    with pytest.raises(ValueError, match="LlamaForCausalLM takes no images"):
        chat.show(pictures["red"])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        Chat(build_llama(), tokenizer)


def test_a_text_models_template_of_parts_gets_the_question():
    model, tokenizer = build_llama(), build_tokenizer()
    chat = Chat(model, tokenizer, max_new_tokens=3)
    answer = chat.ask("Hello")
    inputs = tokenizer("user: Hello<end>assistant: ", return_tensors="pt")
    tokens = generate(model, dict(inputs), 3)[inputs["input_ids"].shape[1] :]
    assert answer == tokenizer.decode(tokens, skip_special_tokens=True).strip()


# ---- the command


def test_one_answer_and_questions_from_a_pipe(saved, pictures, monkeypatch, capsys):
    argv = ["chat", str(saved), "--image", pictures["red"], "--max-new-tokens", "3"]
    assert main([*argv, "--prompt", "What is it?", "--json"]) == 0
    (turn,) = json.loads(capsys.readouterr().out)
    assert turn["prompt"] == "What is it?"
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n\nAnd why?\n"))
    assert main([*argv, "--json"]) == 0
    turns = json.loads(capsys.readouterr().out)
    assert [each["prompt"] for each in turns] == ["What is it?", "And why?"]
    assert turns[0] == turn
    assert main([*argv, "--prompt", "What is it?"]) == 0
    assert capsys.readouterr().out.strip() == turn["answer"]


def test_a_dense_model_is_asked_too(vlm_dir, capsys):
    assert main(["chat", str(vlm_dir), "--prompt", "Hello", "--max-new-tokens", "3", "--json"]) == 0
    (turn,) = json.loads(capsys.readouterr().out)
    assert turn["answer"] == expected(load(vlm_dir), [user("Hello")], 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a terminal")
def test_conversation_at_a_terminal(packed_dir, pictures):
    """In a forked process with a terminal of its own: commands, errors that do not end it, Ctrl-C and Ctrl-D."""
    pytest.importorskip("pty")
    import pty

    child, terminal = pty.fork()
    if child == 0:
        code = 70
        try:
            torch.set_num_threads(1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            chat = Chat(load(packed_dir), build_processor(), max_new_tokens=4)
            asked = chat.ask

            def ask(prompt, on_text=None):
                if prompt == "stop":
                    signal.raise_signal(signal.SIGINT)
                return asked(prompt, on_text)

            chat.ask = ask
            sys.stdin = os.fdopen(0, "r")
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            turns = command._talk(chat, True)
            sys.stdout.write(f"[{len(turns)} turns, {len(chat.messages)} messages]\n")
            sys.stdout.flush()
            code = 0
        finally:
            os._exit(code)

    def until(mark: str) -> str:
        found = ""
        while mark not in found and select.select([terminal], [], [], 60)[0]:
            try:
                found += os.read(terminal, 4096).decode()
            except OSError:  # the other end is closed
                break
        return found

    told = until("> ")
    assert "/help lists the commands" in told
    for typed, answer in (
        ("/imag x", "did you mean `/image`?"),
        ("/image nowhere.png", "there is no picture `nowhere.png`"),
        (f"/image '{pictures['red']}'", "The next question is about"),
        ("What is it?", ""),
        ("stop", "(stopped)"),
        ("/help", "Ctrl-C stops an answer"),
        ("\x03", "Ctrl-D or /quit ends."),
        ("And why?", ""),
    ):
        # a signal that comes while the line editor starts is not seen until the next key
        while typed == "\x03" and psutil.Process(child).status() != psutil.STATUS_SLEEPING:
            time.sleep(0.01)
        os.write(terminal, typed.encode() + (b"" if typed == "\x03" else b"\n"))
        seen = until("\n" + command.SIGN) if typed == "\x03" else until("\r\n" + command.SIGN)
        assert answer in seen, seen
    os.write(terminal, b"\x04")
    assert "[2 turns, 4 messages]" in until("messages]")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
