"""A conversation with a model, about pictures if it takes any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TextStreamer

from .paths import check_image
from .processors import processor_of


class Chat:
    """Keep a conversation with a model; answers are greedy.

    Args:
        model: a generating transformers model.
        processor: its processor or tokenizer with a chat template, or a path or Hub id of one; None: from where the model came.
        images: files, URLs or PIL images that the first question is about.
        max_new_tokens: most tokens of an answer.
        load_kwargs: arguments of `from_pretrained` for the processor.

    Attributes:
        messages: the conversation so far, in the form that chat templates take.
    Raises:
        ValueError: the processor has no chat template, or the model takes no images.
        OSError: there is no such picture.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        images: Sequence[Any] = (),
        max_new_tokens: int = 256,
        **load_kwargs: Any,
    ):
        self.model, self.max_new_tokens = model, max_new_tokens
        self.processor = processor_of(model, processor, "a conversation needs", "pass `processor`", **load_kwargs)
        if not (getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)):
            raise ValueError(
                f"the processor of {type(model).__name__} has no chat template, so this is no model to talk with; take one "
                "that was trained to follow instructions"
            )
        self._has_parts = self._takes_parts()
        self._images: list[Any] = []
        self.messages: list[dict[str, Any]] = []
        for image in images:
            self.show(image)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    def show(self, image: Any) -> None:
        """Put a picture (file, URL or PIL image) beside the next question, after those that are there.

        Raises:
            ValueError: the model takes no images, or the file is no picture.
            OSError: there is no such file.
        """
        if not hasattr(self.processor, "image_processor"):
            raise ValueError(f"{type(self.model).__name__} takes no images; leave the picture out")
        if isinstance(image, str):
            check_image(image)
        self._images.append(image)

    def reset(self) -> None:
        """Forget the conversation and its pictures."""
        self.messages, self._images = [], []

    def ask(self, prompt: str, on_text: Callable[[str], Any] | None = None) -> str:
        """Return the model's answer to a question, and remember both.

        Args:
            prompt: the question.
            on_text: called with each piece of the answer as soon as it is there.
        Raises:
            KeyboardInterrupt: as it came; what was said until then is remembered as the answer. After another error the
                question and its pictures are forgotten.
        """
        said = _Listener(self.tokenizer, on_text)
        self.messages.append({"role": "user", "content": self._content(prompt)})
        try:
            answer = self._generate(said)
        except BaseException as error:
            so_far = "".join(said.pieces).strip()
            if isinstance(error, KeyboardInterrupt) and so_far:
                self._remember(so_far)
            else:
                self.messages.pop()
            raise
        self._remember(answer)
        return answer

    def _generate(self, streamer: TextStreamer) -> str:
        inputs = self.processor.apply_chat_template(
            self.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        whole_numbers = self.processor is self.tokenizer
        dtype = {} if whole_numbers else {"dtype": self.model.dtype}
        inputs = inputs.to(self.model.device, **dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, streamer=streamer)
        length = inputs["input_ids"].shape[1]
        whole = tokens.shape[1] >= length and torch.equal(tokens[:, :length], inputs["input_ids"])
        return self.processor.decode(tokens[0, length if whole else 0 :], skip_special_tokens=True).strip()

    def _takes_parts(self) -> bool:
        """Return whether messages are lists of parts: a processor takes these; a tokenizer's template, these or strings."""
        from .calibration.chat import STRING, ChatEncoder

        return self.processor is not self.tokenizer or ChatEncoder(self.tokenizer).content != STRING

    def _remember(self, answer: str) -> None:
        content = [{"type": "text", "text": answer}] if self._has_parts else answer
        self.messages.append({"role": "assistant", "content": content})

    def _content(self, prompt: str) -> Any:
        if not self._has_parts:
            return prompt
        images, self._images = self._images, []
        return [*map(_part, images), {"type": "text", "text": prompt}]


class _Listener(TextStreamer):
    """Collects an answer while it is generated, and passes its pieces on."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], Any] | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces: list[str] = []
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        if self._on_text and text:
            self._on_text(text)


def _part(image: Any) -> dict[str, Any]:
    kind = "image" if not isinstance(image, str) else "url" if "://" in image else "path"
    return {"type": "image", kind: image}
