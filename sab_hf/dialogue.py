"""A chat with a model about a picture, for trying it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .processors import processor_of


class Chat:
    """Keep a conversation with a model; answers are greedy.

    Args:
        model: a generating transformers model.
        processor: its processor or tokenizer with a chat template, or a path or Hub id of one.
        image: file, URL or PIL image that the first question is about; None: text only.
        max_new_tokens: most tokens of an answer.
    """

    def __init__(self, model: nn.Module, processor: Any, image: Any = None, max_new_tokens: int = 128):
        processor = processor_of(model, processor, "a conversation needs", "pass `processor`")
        if isinstance(image, str):
            check_image(image)
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.has_parts = hasattr(processor, "tokenizer")  # a tokenizer alone takes strings, a processor lists of parts
        if image is not None and not self.has_parts:
            raise ValueError(f"{type(model).__name__} takes no images; leave the image out")
        self._image, self.messages = image, []

    def ask(self, prompt: str) -> str:
        """Return the model's answer to a question, and remember both."""
        self.messages.append({"role": "user", "content": self._content(prompt)})
        inputs = self.processor.apply_chat_template(
            self.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        dtype = {"dtype": self.model.dtype} if self.has_parts else {}  # what a tokenizer returns has none
        inputs = inputs.to(self.model.device, **dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        answer = self.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.messages.append(
            {"role": "assistant", "content": [{"type": "text", "text": answer}] if self.has_parts else answer}
        )
        return answer

    def _content(self, prompt: str) -> Any:
        if not self.has_parts:
            return prompt
        text = {"type": "text", "text": prompt}
        if self._image is None:
            return [text]
        image, self._image = self._image, None
        kind = "image" if not isinstance(image, str) else "url" if "://" in image else "path"
        return [{"type": "image", kind: image}, text]


def check_image(image: str) -> None:
    """Raise a FileNotFoundError unless `image` is a URL or a file that is there."""
    if "://" not in image and not Path(image).is_file():
        raise FileNotFoundError(f"there is no picture `{image}`; name a file or a URL")
