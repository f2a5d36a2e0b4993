"""A chat page for the browser, with pictures, in front of any server that speaks OpenAI's interface. Gradio keeps it."""

from __future__ import annotations

import base64
import mimetypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LONGEST_QUESTION = 1_000_000  # characters; what is longer would be pasted as a file, and a file must be a picture

_CSS = 'button[title="Share"] {display: none}'  # each picture has one; it uploads the picture


def start_page(model: str, base_url: str, host: str, port: int) -> tuple[Any, str]:
    """Start the page in threads of this process.

    Args:
        model: the name by which the server knows the model.
        base_url: the server's address, `/v1` included.
        host, port: where the page is served.
    Returns:
        The page, which has `close()`, and its address.
    Raises:
        OSError: the port is not free.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it would tell its makers of every start
    import gradio
    from openai import OpenAI

    client = OpenAI(api_key="not needed", base_url=base_url)

    def answer(message: dict[str, Any], history: list[dict[str, Any]]) -> Iterator[str]:
        files = [{"type": "file", "file": {"path": path}} for path in message["files"]]
        question = {"role": "user", "content": [*files, {"type": "text", "text": message["text"]}]}
        said = ""
        for chunk in client.chat.completions.create(
            model=model, messages=conversation([*history, question]), stream=True
        ):
            if chunk.choices and chunk.choices[0].delta.content:
                said += chunk.choices[0].delta.content
                yield said

    page = gradio.ChatInterface(
        answer,
        multimodal=True,
        chatbot=gradio.Chatbot(
            show_label=False,
            placeholder="Ask about a picture, or without one.",
            buttons=["copy", "copy_all"],  # the default has one more, which uploads what was said
            scale=1,
        ),
        textbox=gradio.MultimodalTextbox(
            file_types=["image"],
            file_count="multiple",
            placeholder="Question",
            max_plain_text_length=_LONGEST_QUESTION,
            show_label=False,
        ),
        title=model,
        description="Put a picture beside a question with the button on the left, by dropping it, or from the clipboard.",
    )
    where = page.launch(
        server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, show_error=True, css=_CSS
    )[1]
    return page, where


def conversation(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages of a Gradio chat in the form of OpenAI's interface.

    A picture and the question about it come as one message, since some chat templates refuse two of the same role in a row.
    """
    joined: list[dict[str, Any]] = []
    for message in messages:
        if not joined or joined[-1]["role"] != message["role"]:
            joined.append({"role": message["role"], "content": []})
        joined[-1]["content"] += [_part(part) for part in message["content"] if part.get("text") != ""]
    return joined


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "file":
        return {"type": "text", "text": part["text"]}
    path = Path(part["file"]["path"])
    picture = base64.b64encode(path.read_bytes()).decode()
    kind = mimetypes.guess_type(path)[0] or "image/png"
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{picture}"}}
