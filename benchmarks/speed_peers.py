"""Whole language models on a CPU against llama.cpp, in one run: tokens a second, the prompt, resident memory.

Every way runs in a process of its own, one after the other, round by round, so that a busy moment hits all of them. Weights are
random: speed does not depend on them. llama.cpp is the prebuilt package `xllamacpp`, and with `--llama-bench` a build of the
reader's own besides. Rounds of an output file stay in it; medians are over all of them.

    python benchmarks/speed_peers.py --threads 2 --llama-bench build/bin/llama-bench --output speed_peers.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import speed_cpu_model
from speed_cpu_model import IMAGE_TOKENS, LANGUAGE, NEW_TOKENS, TEXT_TOKENS, resident_mib
from timing import kernels_in_use, provenance, write_json

PROMPT = IMAGE_TOKENS + TEXT_TOKENS  # tokens, as many as with a picture
OURS = "sab_hf"
KINDS = {"Q1_0": ("Q1_0", "Q4_0"), "Q4_0": ("Q4_0", "Q4_0"), "Q2_K": ("Q2_K", "Q4_0")}
"""Name of a file → types of its blocks, and of embedding and head. Ours have one plane, and four in embedding and head."""
HALVES = {"Q1_0": (0,), "Q4_0": (0,), "IQ4_NL": (0,), "Q2_K": (80, 82)}
"""Where the float16 numbers lie in a group of each type."""
NARROW = {"Q2_K": "IQ4_NL"}  # what llama.cpp takes where rows are not of whole groups


def random_weights(rows: int, columns: int, kind: str, random: np.random.Generator) -> tuple[np.ndarray, Any]:
    """Random groups of a quantized type, uint8 [rows, bytes], and the type that they have."""
    import gguf

    group, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if columns % group:
        return random_weights(rows, columns, NARROW[kind], random)
    groups = random.integers(0, 256, (rows, columns // group, size), dtype=np.uint8)
    for place in HALVES[kind]:
        groups[..., place : place + 2] = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
    return groups.reshape(rows, -1), gguf.GGMLQuantizationType[kind]


def write_gguf(path: Path, shape: str, name: str) -> None:
    """Write a file with random weights of a language model's shape; one that is there stays."""
    import gguf

    from sab_hf.publish.gguf_header import add_sizes

    if path.exists():
        return
    config, (blocks, head), random = speed_cpu_model.config(shape).text_config, KINDS[name], np.random.default_rng(0)
    hidden, wide, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    keys = hidden // heads * config.num_key_value_heads
    matrices = {
        "attn_q": (hidden, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden), "attn_output": (hidden, hidden),
        "ffn_gate": (wide, hidden), "ffn_up": (wide, hidden), "ffn_down": (hidden, wide),
    }  # fmt: skip
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "qwen2")
    add_sizes(writer, config, None)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["t 1"])

    def add(tensor: str, rows: int, columns: int, kind: str) -> None:
        data, kept = random_weights(rows, columns, kind, random)
        writer.add_tensor(tensor, data, raw_dtype=kept)

    add("token_embd.weight", config.vocab_size, hidden, head)
    add("output.weight", config.vocab_size, hidden, head)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(config.num_hidden_layers):
        for matrix, (rows, columns) in matrices.items():
            add(f"blk.{layer}.{matrix}.weight", rows, columns, blocks)
            if matrix in ("attn_q", "attn_k", "attn_v"):
                writer.add_tensor(f"blk.{layer}.{matrix}.bias", np.zeros(rows, np.float32))
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def measure_package(path: str, threads: int) -> dict[str, float]:
    """Time the package's llama.cpp with a file; in a process of its own."""
    import xllamacpp

    before = resident_mib("VmRSS")
    params = xllamacpp.CommonParams()
    params.model.path, params.verbosity = path, 0
    params.n_ctx, params.n_parallel, params.fit_params = 512, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    question = {
        "n_predict": NEW_TOKENS, "temperature": 0.0, "samplers": ["temperature"], "ignore_eos": True, "cache_prompt": False,
    }  # fmt: skip
    for run in range(2):  # the first one warms up
        prompt = list(range(100 + run, 100 + run + PROMPT))
        answer = server.handle_completions(question | {"prompt": prompt})
    timings = answer["timings"]
    if (timings["prompt_n"], timings["predicted_n"]) != (PROMPT, NEW_TOKENS):
        raise RuntimeError(f"llama.cpp was asked for {PROMPT} and {NEW_TOKENS} tokens, and did {timings}")
    return {
        "tokens_per_s": timings["predicted_per_second"],
        "prompt_tokens_per_s": timings["prompt_per_second"],
        "resident_mib": resident_mib("VmRSS"),
        "resident_before_mib": before,
    }


def measure_native(bench: str, path: Path, threads: int) -> dict[str, float]:
    """Time `llama-bench`: a prompt, and tokens after a text of its length."""
    speeds, peak = [], 0
    for work in (["-p", "0", "-n", str(NEW_TOKENS), "-d", str(PROMPT)], ["-p", str(PROMPT), "-n", "0"]):
        command = [bench, "-m", str(path), "-t", str(threads), "-r", "1", "-o", "json", *work]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"`{' '.join(command)}` failed with {process.returncode}")
        [row] = json.loads(output)
        speeds.append(row["avg_ts"])
        peak = max(peak, usage.ru_maxrss / 1024)
    return {
        "tokens_per_s": speeds[0],
        "prompt_tokens_per_s": speeds[1],
        "resident_mib": peak,
        "resident_before_mib": 0.0,
    }


def in_process(script: str, *arguments: str) -> dict[str, Any]:
    """Run a script of this folder that prints its results as the last line, and return them."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        stdout=subprocess.PIPE, text=True, check=True, env=speed_cpu_model.environment(),
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def measure_ours(shape: str, threads: int, compiled: bool) -> dict[str, float]:
    """Time our model, one plane, embedding and head of four; a prompt of text alone, as the others have."""
    options = ["--one", "packed all", "--shape", shape, "--threads", str(threads), "--text", "--repeats", "1"]
    row = in_process("speed_cpu_model.py", *options, *(["--compile"] if compiled else []))
    return {
        "tokens_per_s": 1e3 / row["ms_per_token"],
        "prompt_tokens_per_s": PROMPT / row["first_token_seconds"],
        "resident_mib": row["resident_mib"] + row["resident_before_mib"],
        "resident_before_mib": row["resident_before_mib"],
        "isa": row["isa"],
    }


def ways(options: argparse.Namespace) -> dict[str, Any]:
    """Name of each way → what measures it."""
    found: dict[str, Any] = {OURS: lambda: measure_ours(options.shape, options.threads, compiled=False)}
    if options.compile:
        found[f"{OURS}, compiled"] = lambda: measure_ours(options.shape, options.threads, compiled=True)
    for kind in options.kinds:
        path = Path(options.folder) / f"{options.shape}-{kind}.gguf"
        write_gguf(path, options.shape, kind)
        package = ("--one", str(path), "--threads", str(options.threads))
        found[f"llama.cpp {kind}, package"] = lambda package=package: in_process(Path(__file__).name, *package)
        if options.llama_bench:
            found[f"llama.cpp {kind}, native"] = lambda path=path: measure_native(
                options.llama_bench, path, options.threads
            )
    return found


def medians(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a way: medians over its rounds, and how many those are."""
    rows = []
    for way in dict.fromkeys(row["way"] for row in rounds):
        own = [row for row in rounds if row["way"] == way]
        numbers = [key for key, value in own[0].items() if isinstance(value, float)]
        rows.append(
            {"way": way, "rounds": len(own)} | {key: statistics.median(row[key] for row in own) for key in numbers}
        )
    return rows


def run(options: argparse.Namespace) -> None:
    """Measure, print, and write what `options` asks for."""
    results: dict[str, Any] = {"provenance": provenance("cpu") | {"threads": options.threads}, "rounds": []}
    if options.output and Path(options.output).exists():
        results["rounds"] = json.loads(Path(options.output).read_text())["rounds"]
    measured = ways(options)
    for _ in range(options.rounds):
        for way, call in measured.items():
            results["rounds"].append({"way": f"{options.shape} {way}"} | call())
            if options.output:
                write_json(options.output, results | {"rows": medians(results["rounds"])})
    for row in medians(results["rounds"]):
        print(
            f"{row['way']:32} {row['tokens_per_s']:7.1f} tokens/s, prompt {row['prompt_tokens_per_s']:7.1f} tokens/s, resident "
            f"{row['resident_mib']:6.0f} MiB ({row['resident_before_mib']:.0f} before the model), {row['rounds']} rounds",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    """Measure what the arguments say, those of the command line by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--shape", choices=LANGUAGE, default="0.5b")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="files for llama.cpp")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="ours compiled too, which takes minutes")
    parser.add_argument("--llama-bench", help="a native build of llama.cpp's program of this name")
    parser.add_argument("--folder", default=".", help="where the files for llama.cpp are, and are written if missing")
    parser.add_argument("--output")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure_package(options.one, options.threads)))
        return
    kernels_in_use()
    run(options)


if __name__ == "__main__":
    main()
