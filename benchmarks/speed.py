"""Speed of packed weights, op by op and end to end, against others in the same run.

GPU: `python benchmarks/speed.py`. CPU: `python benchmarks/speed.py --device cpu`, which is `speed_peers.py` (llama.cpp) with its
options; `speed_cpu.py` and `speed_cpu_model.py` have single products, and models in PyTorch.
"""

import argparse
import sys

import torch
from timing import Turns, provenance, write_json


def main() -> None:
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    chosen, rest = device.parse_known_args()
    if chosen.device == "cpu":
        import speed_peers

        speed_peers.main(rest)
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[device])
    parser.add_argument("--parts", nargs="+", choices=["op", "served", "peers", "model"], default=["op", "model"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="of the model")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--variants", nargs="+", help="of the model; all by default")
    parser.add_argument("--measures", nargs="+", choices=["steps", "generate"], default=["steps", "generate"])
    parser.add_argument("--turns", help="folder shared by processes that measure models on one GPU and take turns")
    parser.add_argument("--processes", type=int, default=1, help="that share --turns")
    parser.add_argument("--output", default="speed.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device; `--device cpu` measures the CPU")
    results = provenance("cuda") | {"command": " ".join(sys.argv)}
    for part in [name for name in options.parts if name != "model"]:
        import speed_gpu
        import speed_gpu_peers

        measure = {"op": speed_gpu.run, "served": speed_gpu.run_served, "peers": speed_gpu_peers.run}[part]
        results[part] = measure(lambda partial, part=part: write_json(options.output, results | {part: partial}), print)
    if "model" in options.parts:
        results["model"] = []
        for row in model_rows(options):
            results["model"].append(row)
            print(row)
            write_json(options.output, results)
    write_json(options.output, results)


def model_rows(options: argparse.Namespace):
    """Yield one row for each variant and batch; what fails puts its error into the row."""
    import speed_gpu_model

    turns = Turns(options.turns, options.processes)
    measures = {"steps": speed_gpu_model.measure_steps, "generate": speed_gpu_model.measure_generate}
    for variant in options.variants or speed_gpu_model.VARIANTS:
        model = speed_gpu_model.build(variant)
        for batch in options.batches:
            row = {"variant": variant, "batch": batch}
            for name in options.measures:
                torch.compiler.reset()
                try:
                    with turns.given_back():
                        row |= measures[name](model, batch, options.tokens, repeats=5, ready=turns.take)
                except Exception as error:  # the others are still worth having
                    row[f"error of {name}"] = repr(error)
            yield row
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
