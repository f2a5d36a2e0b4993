"""Names of checkpoints, folders or Hub ids, with errors that say which of the two was looked for and what was found.

The command line checks names before anything heavy is imported, so transformers is imported here where a config is read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..spelling import did_you_mean


def check_name(path_or_id: str | os.PathLike) -> None:
    """Check, without a network, that a name can be that of a checkpoint.

    Raises:
        ValueError: it is a file.
        FileNotFoundError: it is a folder without `config.json`, or looks like a path and is no folder.
    """
    name, path = str(path_or_id), Path(path_or_id)
    if path.is_file():
        raise ValueError(f"`{name}` is a file; name the folder of a checkpoint, or a Hub repository")
    if path.is_dir():
        if not (path / "config.json").is_file():
            old = next(path.glob(".sab_hf.*.old"), None)
            hint = (
                ""
                if old is None
                else f". A save to it was cut off: the old model is in `{old}`; the next save puts it back"
            )
            raise FileNotFoundError(f"the folder `{name}` holds no checkpoint: it has no config.json{hint}")
    elif not name or name.startswith((".", os.sep, "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"there is no folder `{name}`")


def read_config(path_or_id: str | os.PathLike, **kwargs: Any) -> Any:
    """Read the config of a checkpoint, packed or dense.

    Args:
        path_or_id: a folder or a Hub repository.
        kwargs: arguments of `AutoConfig.from_pretrained`.
    Raises:
        ValueError: the name is that of a file, or transformers does not know the model.
        OSError: there is no such checkpoint.
    """
    from huggingface_hub.errors import HFValidationError
    from transformers import AutoConfig

    if not kwargs.get("subfolder"):
        check_name(path_or_id)
    try:
        return AutoConfig.from_pretrained(path_or_id, **kwargs)
    except (OSError, HFValidationError) as error:
        if Path(path_or_id).is_dir():
            raise
        raise not_found(path_or_id, error) from error
    except ValueError as error:  # it was found, and is of no family that transformers knows
        raise ValueError(f"`{path_or_id}`: {error}") from error
    except Exception as error:  # a config of the wrong form makes transformers raise what it likes
        raise ValueError(
            f"the config.json of `{path_or_id}` has not the form of a config ({type(error).__name__}: {error}); download or "
            "make it again"
        ) from error


def config_here(path_or_id: str | os.PathLike) -> dict[str, Any] | None:
    """Return the data of config.json in a folder here; None if the name is no folder's, or the file is damaged."""
    try:
        found = json.loads((Path(path_or_id) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # what is wrong with it, `read_config` says
        return None
    return found if isinstance(found, dict) else None


def not_found(path_or_id: str | os.PathLike, error: Exception) -> OSError:
    """Return the error for a name that is no folder here and could not be read from the Hub."""
    from huggingface_hub.errors import GatedRepoError

    if any(isinstance(reason, GatedRepoError) for reason in (error, error.__cause__)):
        return OSError(
            f"`{path_or_id}` is gated: accept its conditions on its page on the Hub, then log in with `hf auth login` or set "
            f"HF_TOKEN: {error}"
        )
    folders = [path.parent.name for path in Path().glob("*/config.json")]
    meant = did_you_mean(str(path_or_id), folders)
    return OSError(f"there is no folder `{path_or_id}` here, and it could not be read from the Hub: {error}{meant}")


def quantization_method(config: Any) -> str | None:
    """Return the quantization method that a config names (as an object, or as the data of config.json), or None.

    Raises:
        ValueError: `quantization_config` has another form.
    """
    get = config.get if isinstance(config, dict) else lambda name: getattr(config, name, None)
    quantization = get("quantization_config")
    if not quantization:
        return None
    if isinstance(quantization, (str, int, float, list)):
        raise ValueError(f"config.json: `quantization_config` must be an object, got {quantization!r:.60}")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    return str(getattr(method, "value", method))


def require_dense(config: Any, path_or_id: str | os.PathLike) -> None:
    """Raise a ValueError if a config is that of a quantized checkpoint."""
    method = quantization_method(config)
    if method is not None:
        raise ValueError(f"`{path_or_id}` is quantized already, with {method!r}; name the dense original")


def require_packed(config: Any, path_or_id: str | os.PathLike) -> None:
    """Raise a ValueError unless a config is that of a checkpoint packed by this package."""
    method = quantization_method(config)
    if method != "sab":
        found = "holds dense weights" if method is None else f"is quantized with {method!r}"
        raise ValueError(
            f"`{path_or_id}` {found}, and a checkpoint packed by sab_hf is required. To binarize a dense one: `sab-hf quantize`, "
            "or `quantization_config=SABQuantizationConfig()` in `from_pretrained`"
        )
