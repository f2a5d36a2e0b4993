"""Train the small vision-language model from nothing, score it on held-out samples, and save it.

    python examples/tiny_vlm/train.py --size tiny --output tiny_vlm_checkpoint
    python examples/tiny_vlm/train.py --size small --tower examples/tiny_vlm/checkpoint --output small

Every batch is a function of `--seed` and its index, so `--samples` and `--seed` name a run; `--minutes` measures the
rate first and prints the `--samples` that it chose. One GPU is assumed for a whole run; a few steps run on a CPU.
"""

import argparse
import contextlib
import json
import logging
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_vlm import score, world

logger = logging.getLogger("tiny_vlm.train")

PATCH_SIZE = 8
NUM_IMAGE_TOKENS = (world.IMAGE_SIZE // PATCH_SIZE) ** 2
SPECIAL_TOKENS = ("<pad>", "<end>", "<image>", "<user>", "<assistant>")
PAD, END, IMAGE, USER, ASSISTANT = range(256, 261)  # ids 0..255 are the bytes
VOCAB_SIZE = 264  # 261, rounded up to a multiple of 8
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<' + message['role'] + '>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<end>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"
)

SEQUENCE_LENGTH = 320  # tokens of a training row; whole turns fill it as far as they fit
TEXT_ONLY = 1 / 8  # fraction of a batch without an image
# How often a skill is asked first; a scene's later turns are drawn evenly from what fits it.
VISUAL_WEIGHTS = {"color": 6, "shape": 6, "size": 5, "position": 7, "count": 15, "exists": 15, "read": 28, "chart": 18}
TEXT_WEIGHTS = {"arithmetic": 5, "copy": 3, "recall": 2}


@dataclass(frozen=True)
class Size:
    """A model's widths and depths, its learning rate, and its number of training rows."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    vision_hidden_size: int
    vision_intermediate_size: int
    vision_num_layers: int
    vision_num_heads: int
    learning_rate: float
    samples: int


SIZES = {
    "tiny": Size(256, 512, 4, 8, 160, 320, 4, 5, learning_rate=1.5e-3, samples=5_799_424),
    "small": Size(512, 1408, 6, 8, 160, 320, 4, 5, learning_rate=1e-3, samples=2_000_000),
}


# ---- model and processor


def build_processor() -> LlavaProcessor:
    """Return the processor: one token a byte, five special tokens, images of 96 × 96 in patches of 8 × 8."""
    letters = _byte_letters()
    tokenizer = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    return wrap_tokenizer(fast, CHAT_TEMPLATE)


def wrap_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> LlavaProcessor:
    """Return the processor of the world's pictures and a tokenizer that knows the token `<image>`."""
    side = {"height": world.IMAGE_SIZE, "width": world.IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=SiglipImageProcessor(size=side, do_convert_rgb=True),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
        chat_template=chat_template,
    )


def build_model(size: str, seed: int) -> LlavaForConditionalGeneration:
    """Return a LLaVA model (SigLIP tower, two-layer projector, Llama) with random float32 weights."""
    s = SIZES[size]
    language = LlamaConfig(
        hidden_size=s.hidden_size,
        intermediate_size=s.intermediate_size,
        num_hidden_layers=s.num_layers,
        num_attention_heads=s.num_heads,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=2048,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(build_config(s, language, IMAGE))


def build_config(size: Size, language: PretrainedConfig, image_token: int) -> LlavaConfig:
    """Return the config of a LLaVA with the tower of `size` and a given language model.

    image_token: id of the token that stands at every position of an image
    """
    return LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=size.vision_hidden_size,
            intermediate_size=size.vision_intermediate_size,
            num_hidden_layers=size.vision_num_layers,
            num_attention_heads=size.vision_num_heads,
            image_size=world.IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            vision_use_head=False,
        ),
        text_config=language,
        image_token_index=image_token,
        image_seq_length=NUM_IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=language.tie_word_embeddings,
    )


def take_tower(model: LlavaForConditionalGeneration, directory: Path) -> None:
    """Give `model` the vision tower of the trained model in `directory`, in float32, which training then leaves as it is."""
    trained = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).model.vision_tower
    model.model.vision_tower.load_state_dict(trained.state_dict())
    model.model.vision_tower.requires_grad_(False)


def _byte_letters():
    """Return the printable character that stands for each byte in a byte-level vocabulary, as GPT-2 chose them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


# ---- data


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation becomes tokens, the same as by processor and chat template.

    tokenize: the tokens of a question or an answer
    start, user, reply, end: tokens before the first turn, before a question (and its image), before its answer, after it
    image, pad: ids of those tokens
    """

    tokenize: Callable[[str], list[int]]
    start: list[int]
    user: list[int]
    reply: list[int]
    end: list[int]
    image: int
    pad: int

    @property
    def first(self) -> int:
        """Return the position of a row's first image token."""
        return len(self.start) + len(self.user)

    def turn(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a question, up to where its answer begins, and those of the answer, its end included."""
        return [*self.user, *self.tokenize(question), *self.reply], [*self.tokenize(answer), *self.end]


BYTES = ChatFormat(
    lambda text: list(text.encode()), start=[], user=[USER], reply=[END, ASSISTANT], end=[END], image=IMAGE, pad=PAD
)


def encode(
    sample: world.Sample, max_length: int = SEQUENCE_LENGTH, form: ChatFormat = BYTES
) -> tuple[list[int], list[bool]]:
    """Return the token ids that the processor and its chat template give, and which of them are answers.

    Turns from the first that does not fit `max_length` on are left out whole. Answers include the token that ends them.
    """
    ids, answers = list(form.start), [False] * len(form.start)
    for i, turn in enumerate(sample.turns):
        asked, answered = form.turn(*turn)
        if i == 0 and sample.image is not None:
            asked[len(form.user) : len(form.user)] = [form.image] * NUM_IMAGE_TOKENS
        if len(ids) + len(asked) + len(answered) > max_length:
            break
        ids += asked + answered
        answers += [False] * len(asked) + [True] * len(answered)
    return ids, answers


class Batches(Dataset):
    """Training batches, drawn when they are asked for; batch i depends on the seed and i only.

    An item is (pixels uint8 [num_images, 96, 96, 3], ids int32 [batch_size, length], answers bool [batch_size,
    length]), the rows with an image first.
    """

    def __init__(self, num: int, batch_size: int, seed: int, form: ChatFormat = BYTES):
        self.num, self.batch_size, self.seed, self.form = num, batch_size, seed, form
        self.num_images = batch_size - round(batch_size * TEXT_ONLY)

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rng = random.Random(f"train/{self.seed}/{i}")
        visual = rng.choices(list(VISUAL_WEIGHTS), VISUAL_WEIGHTS.values(), k=self.num_images)
        pixels = np.empty((self.num_images, world.IMAGE_SIZE, world.IMAGE_SIZE, 3), np.uint8)
        ids = np.full((self.batch_size, SEQUENCE_LENGTH), self.form.pad, np.int32)
        answers = np.zeros((self.batch_size, SEQUENCE_LENGTH), bool)
        for row in range(self.batch_size):
            if row < self.num_images:
                sample = world.sample(rng, visual[row], turns=6)
                pixels[row] = np.asarray(sample.image)
            else:
                sample = world.Sample("text", None, [])
            room = SEQUENCE_LENGTH - len(self.form.start) - (NUM_IMAGE_TOKENS if sample.image else 0)
            room -= sum(self._length(turn) for turn in sample.turns)
            while room > 0:  # what a picture has no more questions for, exercises fill
                sample.turns += world.sample(rng, rng.choices(list(TEXT_WEIGHTS), TEXT_WEIGHTS.values())[0]).turns
                room -= self._length(sample.turns[-1])
            row_ids, row_answers = encode(sample, form=self.form)
            ids[row, : len(row_ids)] = row_ids
            answers[row, : len(row_ids)] = row_answers
        return torch.from_numpy(pixels), torch.from_numpy(ids), torch.from_numpy(answers)

    def _length(self, turn: tuple[str, str]) -> int:
        return sum(map(len, self.form.turn(*turn)))


# ---- training


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Return uint8 [N, 96, 96, 3] as the image processor's float32 [N, 3, 96, 96] in -1..1."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def last_hidden(model, pixels, ids, first):
    """Return the normalized hidden states [rows, length, hidden_size] of a batch.

    The same function as the model's on rows whose images all stand at positions `first` to `first + 143`: it calls the model's
    modules in turn, so that no step depends on the data (placeholder search, mask building) and the whole compiles to
    one graph.

    pixels: [num_images, 96, 96, 3] uint8, of the first rows.
    ids: [rows, length] int64, padded on the right.
    """
    inner = model.model
    tower = getattr(inner.vision_tower, "vision_model", inner.vision_tower)
    llama = inner.language_model
    num_images, length = len(pixels), ids.shape[1]

    patches = tower.embeddings(normalize(pixels))
    features = inner.multi_modal_projector(tower.encoder(inputs_embeds=patches).last_hidden_state)
    embeds = llama.embed_tokens(ids)
    features = features.to(embeds.dtype)
    before, after = embeds[:num_images, :first], embeds[:num_images, first + NUM_IMAGE_TOKENS :]
    hidden = torch.cat([torch.cat([before, features, after], dim=1), embeds[num_images:]])

    positions = torch.arange(length, device=ids.device)[None]
    rotary = llama.rotary_emb(hidden, positions)
    for layer in llama.layers:  # no mask: attention is causal, and padding is on the right
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    return llama.norm(hidden)


def compute_losses(model, pixels, ids, answers):
    """Return the summed loss and the number of answer tokens, each [2]: of the rows with an image, of the others.

    pixels, ids: as `last_hidden` takes them.
    answers: [rows, length] bool, the tokens that count.
    """
    num_images, length = len(pixels), ids.shape[1]
    logits = model.lm_head(last_hidden(model, pixels, ids, BYTES.first))[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
        len(ids), length - 1
    )
    loss = loss * answers[:, 1:]
    counts = answers[:, 1:].sum(-1)
    rows = loss.sum(-1)
    return (
        torch.stack([rows[:num_images].sum(), rows[num_images:].sum()]),
        torch.stack([counts[:num_images].sum(), counts[num_images:].sum()]),
    )


class Trainer:
    """AdamW with warm-up and cosine decay, float32 weights, bf16 arithmetic on a GPU.

    kinds: names of what `losses` tells apart
    """

    kinds = ("image rows", "text rows")

    def __init__(self, model, learning_rate: float, num_steps: int, compile: bool):
        self.model, self.learning_rate, self.num_steps = model, learning_rate, num_steps
        self.device = next(model.parameters()).device
        self.compute_losses = torch.compile(compute_losses) if compile else compute_losses
        self.restart()

    def restart(self) -> None:
        """Forget the optimizer's state and begin the schedule again."""
        groups = [{"share": 1.0} | group for group in self.groups()]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=self.device.type == "cuda")

    def groups(self) -> list[dict]:
        """Return the optimizer's groups of parameters; "share" is a group's part of the learning rate, 1 if not given."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim >= 2]
        vectors = [p for p in trained if p.ndim < 2]
        return [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]

    def losses(self, pixels, ids, answers) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what is minimized, and nats per counted token of each of the `kinds`."""
        losses, counts = self.compute_losses(self.model, pixels, ids, answers)
        return losses.sum() / counts.sum(), (losses / counts).detach()

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        warmup = max(1, min(400, self.num_steps // 10))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.num_steps - warmup)))

    def step(self, index: int, batch) -> torch.Tensor:
        """Take one step; return nats per counted token of each of the `kinds`, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * self.rate(index)
        pixels, ids, answers = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        cuda = self.device.type == "cuda"
        with torch.autocast("cuda", dtype=torch.bfloat16) if cuda else contextlib.nullcontext():
            loss, by_kind = self.losses(pixels, ids.long(), answers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return by_kind


def load_batches(batches: Batches, workers: int) -> DataLoader:
    """Return a loader over the batches, in order."""
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def measure_seconds_per_step(trainer: Trainer, batches: Batches, workers: int, seconds: float) -> float:
    """Run the trainer on throw-away weights for a while, and put the weights back."""
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    start, warm = None, 20
    for i, batch in enumerate(load_batches(batches, workers)):
        trainer.step(i, batch)
        if i + 1 == warm:
            _synchronize(trainer.device)
            start = time.perf_counter()
        if start and i % 10 == 0:
            _synchronize(trainer.device)
            if time.perf_counter() - start > seconds:
                break
    elapsed = (time.perf_counter() - start) / (i + 1 - warm)
    trainer.model.load_state_dict(before)
    trainer.restart()
    return elapsed


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_steps(trainer: Trainer, batches: Batches, workers: int, minutes: float) -> None:
    """Give the trainer, and the batches, as many steps as fit into some minutes by a rate that is measured here."""
    begun = time.perf_counter()
    batches.num = 100_000  # more than the measurement takes
    per_step = measure_seconds_per_step(trainer, batches, workers, seconds=15)
    trainer.num_steps = batches.num = int(minutes * 60 / per_step)
    logger.info(f"{1e3 * per_step:.1f} ms a step, measured in {time.perf_counter() - begun:.0f} s")


def train(trainer: Trainer, batches: Batches, workers: int) -> None:
    """Train on the batches; log the loss."""
    begun = time.perf_counter()
    sums, num = torch.zeros(len(trainer.kinds), device=trainer.device), 0
    for i, batch in enumerate(load_batches(batches, workers)):
        sums += trainer.step(i, batch)
        num += 1
        if num == 250 or i + 1 == len(batches):
            means = ", ".join(
                f"{kind} {mean:.4f}" for kind, mean in zip(trainer.kinds, (sums / num).tolist(), strict=True)
            )
            seconds = time.perf_counter() - begun
            logger.info(
                f"step {i + 1}/{len(batches)}  nats/token: {means}  "
                f"{(i + 1) * batches.batch_size / seconds:.0f} samples/s  {seconds:.0f} s"
            )
            sums, num = torch.zeros_like(sums), 0


# ---- saving


def save(model, processor, directory: Path) -> None:
    """Write the model in bfloat16, and its processor, as transformers 4.57 and 5 both read them."""
    directory.mkdir(parents=True, exist_ok=True)
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    language = model.config.text_config
    model.generation_config = GenerationConfig(
        eos_token_id=language.eos_token_id, pad_token_id=language.pad_token_id, do_sample=False
    )
    model.save_pretrained(directory)
    processor.save_pretrained(directory)

    # transformers 5 names the SigLIP tower's modules without `vision_model`, and reads both names; 4.57 reads one.
    file = directory / "model.safetensors"
    tensors = {
        key
        if "vision_tower.vision_model." in key
        else key.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)

    # transformers 5 keeps the image processor in the processor's file, and lists where 4.57 wants dictionaries.
    processor_config = json.loads((directory / "processor_config.json").read_text())
    image_config = processor_config.pop("image_processor", None)
    if image_config is None:
        image_config = json.loads((directory / "preprocessor_config.json").read_text())
    tokenizer_config = json.loads((directory / "tokenizer_config.json").read_text())
    for key in ("extra_special_tokens", "additional_special_tokens", "added_tokens_decoder", "backend"):
        tokenizer_config.pop(key, None)  # tokenizer.json has them
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    image_config["image_processor_type"] = "SiglipImageProcessor"
    for name, content in (
        ("processor_config", processor_config),
        ("preprocessor_config", image_config),
        ("tokenizer_config", tokenizer_config),
    ):
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def score_saved(directory: Path, device: torch.device, num_samples: int) -> LlavaForConditionalGeneration:
    """Load what `save` wrote, float32, log its score on held-out samples, and return the model."""
    begun = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).to(device)
    processor = AutoProcessor.from_pretrained(directory)
    result = score.evaluate(model, processor, world.samples(num_samples, "held-out"), batch_size=256)
    logger.info(f"scored in {time.perf_counter() - begun:.0f} s\n{result}")
    return model


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--samples", type=int, help="training rows, four or five questions each (default: the recipe's)"
    )
    amount.add_argument("--minutes", type=float, help="measure the rate, then train for as many samples as fit")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, help="at its peak (default: the recipe's)")
    parser.add_argument("--workers", type=int, default=14, help="processes that draw data")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--eval-samples", type=int, default=2200)
    parser.add_argument(
        "--tower", type=Path, help="a trained model, whose vision tower is taken and not trained further"
    )
    parser.add_argument("--state", type=Path, help="also save the float32 weights here, as safetensors")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    recipe = SIZES[args.size]
    processor = build_processor()
    model = build_model(args.size, args.seed)
    if args.tower:
        take_tower(model, args.tower)
    model.to(device).train()
    logger.info(f"{args.size}: {model.num_parameters():,} parameters, on {device}")

    num_steps = (args.samples or recipe.samples) // args.batch_size
    trainer = Trainer(model, args.learning_rate or recipe.learning_rate, num_steps, args.compile)
    batches = Batches(num_steps, args.batch_size, args.seed)
    if args.minutes:
        choose_steps(trainer, batches, args.workers, args.minutes)
        logger.info(f"that is --samples {trainer.num_steps * args.batch_size}")
    begun = time.perf_counter()
    train(trainer, batches, args.workers)
    logger.info(f"trained {trainer.num_steps * args.batch_size} samples in {time.perf_counter() - begun:.0f} s")

    if args.state:
        save_file({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}, args.state)
    save(model, processor, args.output)
    score_saved(args.output, device, args.eval_samples)


if __name__ == "__main__":
    main()
