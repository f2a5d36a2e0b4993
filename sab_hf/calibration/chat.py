"""Conversations → model inputs, through whatever chat template and processor the model comes with."""

from __future__ import annotations

import contextlib
import inspect
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from jinja2 import TemplateError
from PIL import Image
from transformers import PreTrainedTokenizerBase

from .samples import Sample, load_media

logger = logging.getLogger(__name__)

# What a chat template takes as the content of a message.
PARTS = "parts"  # a list of parts
MIXED = "mixed"  # a list of parts from the user, a string from the others
STRING = "string"  # a string, with the placeholder of an image written in it
NO_TEMPLATE = "none"

_PROBE = "calibration probe"
_READERS = {
    "video": ("video_processor",),
    "audio": ("feature_extractor", "audio_processor"),
}
"""Kind of media → parts of a processor that read it; other processors ignore it without a word."""


class ChatEncoder:
    """Turn samples into what `model(**inputs)` takes. Tokens are never truncated.

    Args:
        processor: the model's processor, or a tokenizer (text alone is then taken from the samples).
        max_image_pixels: larger images are shrunk to this many pixels; None keeps them.
        allow_urls: whether files that samples name by URL are fetched.

    Attributes:
        tokenizer: the processor's tokenizer.
        content: what the chat template takes: PARTS, MIXED, STRING or NO_TEMPLATE.
    """

    def __init__(self, processor: Any, max_image_pixels: int | None = None, allow_urls: bool = False):
        self.processor, self.max_image_pixels, self.allow_urls = processor, max_image_pixels, allow_urls
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.text_only = isinstance(processor, PreTrainedTokenizerBase)
        self._template = getattr(processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        self.content = self._find_content()
        self._image_token = self._find_image_token()

    def __call__(
        self, samples: list[Sample], *, padding: bool = False, padding_side: str = "right", reply: bool = False
    ) -> dict[str, Any]:
        """Process samples into one batch.

        Args:
            samples: all of them with images, video or audio, or all of them without.
            padding: pad to the longest sample.
            padding_side: "right" or "left".
            reply: end with what the template writes before the model's next reply.

        Raises:
            ValueError: a file cannot be read, the samples need a chat template that the processor lacks, or hold what it
                does not read.
        """
        with tempfile.TemporaryDirectory(prefix="sab_hf.") if self.allow_urls else contextlib.nullcontext() as scratch:
            conversations = [self._messages(sample, scratch and Path(scratch)) for sample in samples]
            return self._process(conversations, padding, padding_side, reply)

    def _process(self, conversations: list, padding: bool, padding_side: str, reply: bool) -> dict[str, Any]:
        options: dict[str, Any] = {"padding": True, "padding_side": padding_side} if padding else {}
        if self.content == PARTS and not self.text_only:
            return dict(self._apply_template(conversations, tokenize=True, options=options, reply=reply))
        prompts = [self._prompt(messages, reply) for messages in conversations]
        bos = getattr(self.tokenizer, "bos_token", None)
        if self.content != NO_TEMPLATE and (self.text_only or (bos and prompts[0].startswith(bos))):
            options["add_special_tokens"] = False  # the template has written them
        if self.text_only:
            return dict(self.tokenizer(prompts, return_tensors="pt", **options))
        images = [[part["image"] for part in _parts(messages, "image")] for messages in conversations]
        if any(images):
            # Processors read a flat list in different ways, except for a single image.
            options["images"] = images[0] if len(images) == 1 and len(images[0]) == 1 else images
        return dict(self.processor(text=prompts, return_tensors="pt", **options))

    def needs_image(self, model_config: Any) -> bool:
        """Return whether text alone is refused, by the processor (PaliGemma) or by the model's forward (BLIP-2)."""
        if self.text_only or self.content != NO_TEMPLATE:
            return False
        model_class = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(model_config), None)
        if model_class is not None:
            pixels = inspect.signature(model_class.forward).parameters.get("pixel_values")
            if pixels is not None and pixels.default is inspect.Parameter.empty:
                return True
        try:
            self.processor(text=[_PROBE], return_tensors="pt")
        except (TypeError, ValueError):
            return True
        return False

    def _messages(self, sample: Sample, scratch: Path | None) -> list[dict[str, Any]]:
        if self.text_only:
            return [{**message, "content": _parts([message], "text")} for message in sample.messages]
        self._check_media(sample)
        return load_media(sample, self.max_image_pixels, self.allow_urls, scratch)

    def _check_media(self, sample: Sample) -> None:
        """Raise a ValueError if a sample holds what would be left out in silence."""
        name = type(self.processor).__name__
        if self.content != PARTS and sample.num_media > sample.num_images:
            raise ValueError(
                f"{sample.where}: video and audio need a processor whose chat template takes lists of parts; "
                f"{name} has none. Pass processed batches"
            )
        for kind in [kind for kind in sample.kinds if kind in _READERS]:
            if not any(getattr(self.processor, reader, None) is not None for reader in _READERS[kind]):
                raise ValueError(
                    f"{sample.where}: it holds {kind}, which {name} does not read: it has no "
                    f"{' or '.join(f'`{reader}`' for reader in _READERS[kind])}. Leave the sample out, or pass processed batches"
                )
        if sample.unread and not sample.num_media:
            raise ValueError(
                f"{sample.where}: key {sample.unread[0]!r} holds media, and is none of the keys that are read; name a picture "
                "'image' (or 'images'), put video and audio into 'messages', or remove the key"
            )

    def _prompt(self, messages: list[dict[str, Any]], reply: bool = False) -> str:
        if self.content == NO_TEMPLATE:
            texts = [part["text"] for part in _parts(messages, "text")]
            return self._image_token * len(_parts(messages, "image")) + "\n".join(texts)
        return self._apply_template([self._as_content(messages)], tokenize=False, reply=reply)[0]

    def _as_content(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            message
            if self.content == PARTS or (self.content == MIXED and message["role"] == "user")
            else {**message, "content": self._as_string(message["content"])}
            for message in messages
        ]

    def _as_string(self, parts: list[dict[str, Any]]) -> str:
        return "\n".join(part["text"] if part["type"] == "text" else self._image_token for part in parts)

    def _apply_template(
        self, conversations: list, *, tokenize: bool, options: dict[str, Any] | None = None, reply: bool = False
    ) -> Any:
        target = self.processor if hasattr(self.processor, "apply_chat_template") else self.tokenizer
        kwargs: dict[str, Any] = {"tokenize": tokenize, "chat_template": _default_template(self._template)}
        if reply:
            kwargs["add_generation_prompt"] = True
        if tokenize:
            kwargs |= {"return_dict": True, "return_tensors": "pt"}
        if options:
            takes_dict = "processor_kwargs" in inspect.signature(target.apply_chat_template).parameters
            kwargs |= {"processor_kwargs": options} if takes_dict else options
        return target.apply_chat_template(conversations, **kwargs)

    def _find_content(self) -> str:
        """Try what the template takes: some concatenate the content to a string, some only that of the assistant.

        A template of parts writes nothing of a string, and raises nothing.
        """
        if self._template is None:
            return NO_TEMPLATE
        parts, string = [{"type": "text", "text": _PROBE}], _PROBE
        forms = [(PARTS, parts, parts), (MIXED, parts, string)]
        for content, question, answer in [(STRING, string, string), *forms] if self.text_only else forms:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            try:
                prompt = self._apply_template([messages], tokenize=False)[0]
            except (TypeError, KeyError, AttributeError, TemplateError):
                continue
            if prompt.count(_PROBE) == 2 and "'type'" not in prompt and '"type"' not in prompt:
                return content
        return STRING

    def _find_image_token(self) -> str:
        """Find what stands for an image in a prompt where no template writes it: Gemma 3 has two candidates."""
        if self.text_only or self.content in (PARTS, MIXED) or hasattr(self.processor, "num_query_tokens"):
            return ""  # the last: a Q-Former's processor puts its own in front
        owners = (self.processor, self.tokenizer)
        found = [getattr(owner, name, None) for name in ("image_token", "boi_token") for owner in owners]
        candidates = [str(token) for token in found if token is not None]
        for token in candidates:
            try:
                self.processor(text=[token + _PROBE], images=[Image.new("RGB", (64, 64))], return_tensors="pt")
            except ValueError:  # as many placeholders as images are required
                continue
            return token
        return candidates[0] if candidates else ""


@contextlib.contextmanager
def borrowed(tokenizer: Any) -> Iterator[None]:
    """Let a tokenizer pad on the right, and give it back as it was.

    Each call of a fast tokenizer writes its padding and truncation into what is later saved as `tokenizer.json`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = (backend.truncation, backend.padding) if backend is not None else (None, None)
    side = tokenizer.padding_side
    tokenizer.padding_side = "right"
    try:
        yield
    finally:
        tokenizer.padding_side = side
        if backend is not None:
            backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
            backend.no_padding() if padding is None else backend.enable_padding(**padding)


def _parts(messages: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [part for message in messages for part in message["content"] if part["type"] == kind]


def _default_template(template: Any) -> str:
    """Return the template; where there are several, the one named "default", else the first."""
    if isinstance(template, str):
        return template
    return template["default"] if "default" in template else next(iter(template.values()))
