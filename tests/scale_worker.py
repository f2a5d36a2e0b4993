"""A run on a tiny random LLaVA, for the tests of resuming and of several processes; as a script, one process of several.

torchrun --nproc-per-node 2 scale_worker.py OUTPUT_RANK.safetensors CONFIG.json
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import build_llava, build_processor, build_samples
from processes import FORK, begin_forked
from safetensors.torch import save_file

import sab_hf.make.binarize
from sab_hf import SABQuantizationConfig, quantize

NUM_BLOCKS = 4
UNMEASURED = {"significance": "paper", "budget": "uniform"}
"""A config without the pass that measures sensitivity, so that the blocks are the only stages."""
MEASURED = {"significance": "gradient", "budget": "sensitivity", "refine_loss": "gradient"}


def build_config(**changes) -> SABQuantizationConfig:
    values = {
        "num_samples": 5,
        "batch_size": 2,
        "alternations": 1,
        "refine_steps": 2,
        "refine_batch": 3,
        "distil_steps": 0,
    }
    values |= UNMEASURED
    return SABQuantizationConfig(calibration=build_samples(), **values | changes)


def run(family: str | None = None, **changes) -> torch.nn.Module:
    """Quantize the tiny LLaVA, or one of `family_zoo`."""
    if family is not None:
        from family_zoo import FAMILIES

        made = FAMILIES[family]()
        made.model.sab_record = quantize(made.model, None, made.batches, build_config(**changes))
        return made.model
    model = build_llava(attention_bias=True, num_hidden_layers=NUM_BLOCKS)
    model.sab_record = quantize(model, build_processor(), None, build_config(**changes))
    return model


def launch(count: int, output: Path, errors: Path, mortal: int | None = None, **changes) -> list[int]:
    """Quantize in `count` processes; returns their exit codes.

    Each writes its model to `output` with its number in place of RANK. Process `mortal` kills itself at its second block.
    """

    def work(rank: int) -> None:
        original, blocks = sab_hf.make.binarize._fit_block, []

        def fit_or_die(*args):
            blocks.append(args)
            if rank == mortal and len(blocks) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        sab_hf.make.binarize._fit_block = fit_or_die
        main(str(output), json.dumps(changes))

    return fork(count, work, errors)


def fork(count: int, work: Callable[[int], None], errors: Path) -> list[int]:
    """Run `work(rank)` in `count` processes with the environment that `torchrun` gives them; returns their exit codes.

    Each writes the message of an error to a file in `errors`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [FORK.Process(target=_process, args=(rank, count, port, work, errors)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=320)
        process.kill()
    return [process.exitcode for process in processes]


def _process(rank: int, count: int, port: int, work: Callable[[int], None], errors: Path) -> None:
    begin_forked()
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()})
    try:
        work(rank)
    except Exception as error:
        (errors / f"error {rank}").write_text(str(error))
        raise


def write(state: dict[str, torch.Tensor], output: Path) -> None:
    temporary = output.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary)
    temporary.replace(output)


def main(output: str, changes: str) -> None:
    state = run(**json.loads(changes)).state_dict()
    write(state, Path(output.replace("RANK", str(dist.get_rank()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
