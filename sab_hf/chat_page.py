"""A chat page for the browser, with pictures, in front of any server that speaks OpenAI's interface. Gradio keeps it."""

from __future__ import annotations

import os
from typing import Any


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

    page = gradio.load_chat(
        base_url,
        model,
        token="not needed",
        file_types="image",
        title=model,
        description="Put a picture beside a question with the button on the left, by dropping it, or from the clipboard.",
    )
    where = page.launch(server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False)[1]
    return page, where
