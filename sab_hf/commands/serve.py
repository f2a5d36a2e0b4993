"""`sab-hf serve`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import time
import urllib.request
from typing import Any

from ..trust import trusting
from .shared import DTYPES, UsageError, add_trust_remote_code, check_models, say

SUMMARY = "serve a model over HTTP (OpenAI's interface), with a chat page for the browser"
EXAMPLE = "sab-hf serve examples/tiny_vlm-sab"
_NEEDS = {"transformers": ("fastapi", "uvicorn", "openai"), "vllm": ("vllm",)}
_INSTALL = {"transformers": 'pip install "sab_hf[serve]"', "vllm": 'pip install "sab_hf[vllm]"'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id, packed or dense")
    parser.add_argument("--engine", choices=tuple(_NEEDS), default="transformers", help="which server")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address of server and page; 0.0.0.0: all of this machine's"
    )
    parser.add_argument("--port", type=int, default=8000, help="port of the server")
    parser.add_argument(
        "--page", action=argparse.BooleanOptionalAction, help='chat page (default: if there is Gradio, "sab_hf[chat]")'
    )
    parser.add_argument("--page-port", type=int, default=7860, help="port of the chat page")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of weights and activations; auto: as stored"
    )
    parser.add_argument("--device", help="device, for example cpu or cuda:0 (default: the server's choice)")
    add_trust_remote_code(parser)
    parser.add_argument(
        "--server-args", nargs=argparse.REMAINDER, default=[], metavar="...",
        help="everything after this goes to the server as it is",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    check_models(args)
    _check_installed(args)
    if _answers(_address(args)):
        raise UsageError(f"something else answers at {_address(args)}; choose another --port")


def run(args: argparse.Namespace) -> tuple[Any, str]:
    from ..publish.inspect import empty_model
    from ..publish.locate import quantization_method, read_config

    code = trusting(args.trust_remote_code)
    config = read_config(args.model, **code)
    if quantization_method(config) == "sab":
        empty_model(config, args.model, **code)  # mistakes are told here, not in the log of a server
    address = _address(args)
    server = subprocess.Popen([sys.executable, "-m", f"{__package__.partition('.')[0]}.run", *command(args)])
    page = None
    try:
        while not _answers(f"{address}/health"):
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with code {server.returncode}; its own words are above")
            time.sleep(0.2)
        say(f"serving `{args.model}` at {address}/v1; Ctrl-C ends")
        if args.page:
            from ..chat_page import start_page

            page, where = start_page(args.model, f"{address}/v1", args.host, args.page_port)
            say(f"chat page: {where}")
        server.wait()
        if server.returncode:
            raise RuntimeError(f"the server ended with code {server.returncode}; its own words are above")
    except KeyboardInterrupt:  # the usual way to end a server
        pass
    finally:
        if page is not None:
            page.close(verbose=False)
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(10)
        server.kill()
    return None, ""


def command(args: argparse.Namespace) -> list[str]:
    """Return the server's command and its arguments, for `python -m sab_hf.run`."""
    found = [args.engine, "serve", args.model]
    if args.engine == "transformers" and importlib.util.find_spec("transformers.cli") is None:  # transformers 4
        found[2:] = ["--force_model", args.model]
    options = {"--host": args.host, "--port": str(args.port), "--dtype": args.dtype}
    if args.device:
        options["--device"] = args.device
    found += [text for option in options.items() for text in option]
    if args.trust_remote_code:
        dashes = "--force_model" not in found
        found.append("--trust-remote-code" if dashes else "--trust_remote_code")
    return [*found, *args.server_args]


def _address(args: argparse.Namespace) -> str:
    return f"http://{'127.0.0.1' if args.host == '0.0.0.0' else args.host}:{args.port}"


def _check_installed(args: argparse.Namespace) -> None:
    """Raise an ImportError if the engine, or a page that is asked for, is not installed; decide whether there is a page."""
    missing = [name for name in _NEEDS[args.engine] if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"--engine {args.engine} needs {', '.join(missing)}: {_INSTALL[args.engine]}")
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if args.engine == "vllm" and not any(plugin.value.startswith("sab_hf.") for plugin in plugins):
        raise ImportError("vLLM finds no plugin of sab_hf (entry point `vllm.general_plugins`); install sab_hf again")
    has_gradio = importlib.util.find_spec("gradio") is not None
    if args.page and not has_gradio:
        raise ImportError('--page needs Gradio: pip install "sab_hf[chat]"')
    if args.page is None:
        args.page = has_gradio


def _answers(address: str) -> bool:
    """Return whether an HTTP server answers at `address`."""
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
