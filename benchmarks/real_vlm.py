"""A vision-language model whose language model has real weights: SmolLM2-135M-Instruct that sees the generated world.

`real_lm.py build` writes the language model's folder. `train` joins it to the vision tower of `examples/tiny_vlm` by a new
projector, and `run` binarizes it by every method and measures both modalities:

    python benchmarks/real_vlm.py train smollm2 --text ../shared/real --minutes 5 --output smol_vlm
    python benchmarks/real_vlm.py run smol_vlm --text ../shared/real --jobs 6 --output real_vlm.json
    python benchmarks/real_vlm.py table real_vlm.json

Training asks questions about pictures, and text-only exercises, in the chat format of SmolLM2. On the text of
`wikitext2_valid.txt` the model is held to the next-token distribution of the language model as it was, so that what it knows of
text stays as it is. Measured are held-out questions of the world, and the perplexity of `wikitext2_test.txt`. See README.md.
"""

import argparse
import copy
import json
import logging
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples"), str(HERE.parent)]

import tables  # noqa: E402
import torch  # noqa: E402
from fidelity import QUESTION_COLUMNS, add_world_options, compare  # noqa: E402
from measure import calibration_samples, load, measure  # noqa: E402
from methods import compress, floor_bits  # noqa: E402
from real_lm import (  # noqa: E402
    TextSettings,
    add_text_folder,
    add_text_options,
    calibration_batches,
    list_jobs,
    perplexity,
    settings_of,
    tokens_of,
)
from runner import Job  # noqa: E402
from tables import SECONDS, Column, add_options  # noqa: E402
from tiny_vlm import train as recipe  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

logger = logging.getLogger("real_vlm")

IMAGE_TOKEN = "<image>"
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>"
USER, REPLY, END = "\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
CHAT_TEMPLATE = (
    # SmolLM2's own, with pictures; the line break after a turn stands before the next one
    "{%- for message in messages -%}"
    "{%- if loop.first and message['role'] != 'system' -%}{{- " + json.dumps(SYSTEM) + " -}}{%- endif -%}"
    "{{- ('' if loop.first and message['role'] == 'system' else '\n') + '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\n<|im_start|>assistant\n' -}}{%- endif -%}"
)
TEXT_SHARE = 1 / 8  # plain text of a batch's rows, beside as many exercises
VOCABULARY_MULTIPLE = 8  # the embedding's rows are rounded up to
COLUMNS = (
    *QUESTION_COLUMNS,
    Column("same answers %", "agreement", ".1f", 100),
    Column("WikiText-2 perplexity", "perplexity", ".4g"),
    SECONDS,
)


@dataclass(frozen=True)
class MixedSettings(TextSettings):
    """Settings of both modalities; `samples` and `questions` are of the world.

    text_samples: calibration samples of text, 0 for the whole text
    text_batch: stretches of the measured text a forward pass
    """

    text_samples: int = 0
    text_batch: int = 8


# ---- model and data


def build_model(folder: Path, tower: Path, seed: int) -> tuple[LlavaForConditionalGeneration, nn.Module, Any]:
    """Return a LLaVA, float32, with the language model of `folder`; that model by itself; and the LLaVA's processor.

    tower: trained model of the generated world, whose vision tower is taken and stays as it is; the projector is random
    """
    # of a generic class, 4.57 also makes token types, which Llama does not take
    tokenizer = AutoTokenizer.from_pretrained(folder, model_input_names=["input_ids", "attention_mask"])
    language = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    grown = copy.deepcopy(language)
    known = len(language.get_input_embeddings().weight)
    rows = max(known, -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE)
    grown.resize_token_embeddings(rows, mean_resizing=False)
    for matrix in (grown.get_input_embeddings().weight, grown.get_output_embeddings().weight):
        with torch.no_grad():
            matrix[known:] = matrix[:known].mean(0)
    torch.manual_seed(seed)
    size = recipe.SIZES["tiny"]
    config = recipe.build_config(size, grown.config, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(grown.model.state_dict())
    model.lm_head.load_state_dict(grown.lm_head.state_dict())
    recipe.take_tower(model, tower)
    return model, language, recipe.wrap_tokenizer(tokenizer, CHAT_TEMPLATE)


def chat_format(tokenizer: PreTrainedTokenizerBase) -> recipe.ChatFormat:
    """Return how the processor with `CHAT_TEMPLATE` makes tokens of a conversation."""

    def tokenize(text: str) -> list[int]:
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids  # twenty times faster than a call

    return recipe.ChatFormat(
        tokenize,
        *(tokenize(text) for text in (SYSTEM, USER, REPLY, END)),
        image=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        pad=tokenizer.pad_token_id,
    )


class MixedBatches(recipe.Batches):
    """Batches of the world, with rows of plain text, cut at random, after them.

    text: all its tokens [n], at least as many as a row has
    """

    def __init__(self, num: int, batch_size: int, seed: int, form: recipe.ChatFormat, text: Tensor):
        if len(text) < recipe.SEQUENCE_LENGTH:
            raise ValueError(f"the text must have at least {recipe.SEQUENCE_LENGTH} tokens, got {len(text)}")
        self.num_text = max(1, round(batch_size * TEXT_SHARE))
        super().__init__(num, batch_size - self.num_text, seed, form)
        self.text = text

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        pixels, ids, answers = super().__getitem__(i)
        draw = random.Random(f"text/{self.seed}/{i}")
        room = len(self.text) - recipe.SEQUENCE_LENGTH + 1
        starts = torch.tensor([draw.randrange(room) for _ in range(self.num_text)])
        rows = self.text[starts[:, None] + torch.arange(recipe.SEQUENCE_LENGTH)].to(ids.dtype)
        return pixels, torch.cat([ids, rows]), torch.cat([answers, torch.ones_like(rows, dtype=torch.bool)])


class MixedTrainer(recipe.Trainer):
    """Trains the language model at a lower rate than the projector, and holds it to itself on the rows of plain text.

    language: the language model as it was; form: of the conversations; num_text: rows of plain text, the last of a batch
    rate, language_rate: learning rates of the projector and of the language model, at their peak
    compile: the blocks of the language models are compiled
    """

    kinds = ("image rows", "exercises", "text, divergence from the model as it was")

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        language: nn.Module,
        form: recipe.ChatFormat,
        num_text: int,
        rate: float,
        language_rate: float,
        num_steps: int,
        compile: bool,
    ):
        self.language, self.first, self.num_text = language, form.first, num_text
        self.language_share = language_rate / rate
        if compile:
            for block in (*model.model.language_model.layers, *language.model.layers):
                block.compile()  # one by one: they are alike, so the first pays for all
        super().__init__(model, rate, num_steps, compile=False)

    def groups(self) -> list[dict]:
        language = {
            id(p): p for part in (self.model.model.language_model, self.model.lm_head) for p in part.parameters()
        }
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in language]
        groups = ({"params": others}, {"params": list(language.values()), "share": self.language_share})
        return [group | {"weight_decay": 0.0} for group in groups]

    def losses(self, pixels: Tensor, ids: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Return nats per answer token plus the divergence per token of text; and both, by kind."""
        hidden = recipe.last_hidden(self.model, pixels, ids, self.first)[:, :-1]
        asked = len(ids) - self.num_text
        chosen, targets = answers[:asked, 1:], ids[:asked, 1:]
        nats = nn.functional.cross_entropy(
            self.model.lm_head(hidden[:asked][chosen]).float(), targets[chosen], reduction="none"
        )
        has_image = chosen.nonzero()[:, 0] < len(pixels)
        with torch.no_grad():
            before = self.language(input_ids=ids[asked:], use_cache=False).logits[:, :-1].float().log_softmax(-1)
        now = self.model.lm_head(hidden[asked:]).float().log_softmax(-1)[..., : before.shape[-1]]
        divergence = nn.functional.kl_div(now, before, reduction="none", log_target=True).sum(-1).mean()
        by_kind = torch.stack([nats[has_image].mean(), nats[~has_image].mean(), divergence])
        return nats.mean() + divergence, by_kind.detach()


def train(args: argparse.Namespace) -> None:
    """Train, save, and log the score on held-out questions and the perplexity of the test text before and after."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes that draw batches are forks
    torch.set_float32_matmul_precision("high")
    begun = time.perf_counter()
    device = torch.device(args.device)
    model, language, processor = build_model(args.language, args.tower, args.seed)
    form = chat_format(processor.tokenizer)
    batches = MixedBatches(
        args.steps or 0, args.batch_size, args.seed, form, tokens_of(processor.tokenizer, args.text, "valid")
    )
    test = tokens_of(processor.tokenizer, args.text, "test")
    settings = settings_of(args, TextSettings, model=str(args.output), samples=0, eval_batch=8, threads=1)
    model.to(device).train()
    language.to(device)
    logger.info(f"{model.num_parameters():,} parameters, on {device}")
    before = perplexity(language, test, settings)
    trainer = MixedTrainer(
        model, language, form, batches.num_text, args.rate, args.language_rate, len(batches), args.compile
    )
    if args.steps is None:
        recipe.choose_steps(trainer, batches, args.workers, args.minutes)
        logger.info(f"that is --steps {len(batches)}")
    recipe.train(trainer, batches, args.workers)
    recipe.save(model, processor, args.output)
    if device.type == "cuda":
        logger.info(f"peak of GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    del trainer, model
    model = recipe.score_saved(args.output, device, args.questions)
    after = perplexity(model.eval(), test, settings)
    logger.info(f"perplexity of the test text: {before:.2f} as it was, {after:.2f} now")
    logger.info(f"{time.perf_counter() - begun:.0f} s in all")


# ---- rows and tables


def mixed_samples(processor: Any, settings: MixedSettings, samples: int, seed: int) -> list[dict[str, Any]]:
    """Return processed batches of questions of the world with their answers, pictures and exercises apart, and of text."""
    conversations = calibration_samples(samples, seed)
    pictures = [
        [p["image"] for m in messages for p in m["content"] if p["type"] == "image"] for messages in conversations
    ]
    batches = []
    for with_image in (True, False):
        group = [i for i, images in enumerate(pictures) if bool(images) == with_image]
        for start in range(0, len(group), settings.batch_size):
            part = group[start : start + settings.batch_size]
            texts = processor.apply_chat_template([conversations[i] for i in part], tokenize=False)
            images = [image for i in part for image in pictures[i]] or None
            inputs = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
            batches.append(dict(inputs))
    return batches + calibration_batches(processor.tokenizer, settings, settings.text_samples, seed)


def do(job: Job, settings: MixedSettings) -> dict[str, Any]:
    """Return the measures of one job: those of `measure.measure`, and "perplexity" of the test text."""
    model, processor = load(settings.model, settings.device, getattr(torch, settings.dtype))
    test = tokens_of(processor.tokenizer, settings.text, "test")  # a missing file is told before the work
    row = compress(model, processor, job, settings, partial(mixed_samples, processor, settings))
    model.eval()
    row |= measure(model, processor, settings.questions, settings.eval_batch)
    return row | {"perplexity": perplexity(model, test, replace(settings, eval_batch=settings.text_batch))}


def run(args: argparse.Namespace) -> list[dict]:
    """Run the chosen rows, full precision among them, and write JSON after each, and the table in the end."""
    jobs = list_jobs(floor_bits(args.model), args.seeds, args.options, args.name)
    return tables.run(jobs, settings_of(args, MixedSettings), do, args, COLUMNS, compare)


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("train", help="a folder for from_pretrained from a language model's folder")
    made.add_argument("language", type=Path, help="folder of the language model")
    add_text_folder(made)
    made.add_argument("--output", type=Path, required=True, help="folder that is written")
    made.add_argument("--tower", type=Path, default=HERE.parent / "examples" / "tiny_vlm" / "checkpoint")
    amount = made.add_mutually_exclusive_group()
    amount.add_argument("--minutes", type=float, default=5.0, help="measure the rate, then train for as long")
    amount.add_argument("--steps", type=int, help="train for this many steps")
    made.add_argument("--batch-size", type=int, default=64, help="rows of a step")
    made.add_argument("--rate", type=float, default=1e-3, help="learning rate of the projector, at its peak")
    made.add_argument("--language-rate", type=float, default=3e-4, help="of the language model")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--workers", type=int, default=14, help="processes that draw data")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    made.add_argument("--questions", type=int, default=2200, help="held-out samples that are scored")
    made.add_argument("--window", type=int, default=1024, help="tokens of a stretch of the measured text")
    made.add_argument("--windows", type=int, default=96, help="stretches that are measured")
    ran = commands.add_parser("run", help="quantize by every method and measure")
    add_text_options(ran)
    add_options(ran, "real_vlm.json")
    add_world_options(ran)
    ran.add_argument("--text-samples", type=int, default=0, help="calibration texts; 0: the whole calibration text")
    shown = commands.add_parser("table", help="print the table of one or several results")
    shown.add_argument("results", type=Path, nargs="+")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = arguments().parse_args(argv)
    if args.command == "train":
        train(args)
    elif args.command == "run":
        run(args)
    else:
        print(tables.markdown([row for path in args.results for row in json.loads(path.read_text())["rows"]], COLUMNS))


if __name__ == "__main__":
    main()
