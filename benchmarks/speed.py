"""Speed of packed weights, op by op and end to end, against dense ones in the same run. GPU: `python benchmarks/speed.py`."""

import argparse
import sys

import torch
from timing import provenance, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--device", choices=["cuda"], default="cuda", help="the CPU has speed_cpu.py, speed_cpu_model.py"
    )
    parser.add_argument("--parts", nargs="+", choices=["op", "model"], default=["op", "model"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="of the model")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--output", default="speed.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device; benchmarks/speed_cpu.py and speed_cpu_model.py measure the CPU")
    results = provenance("cuda") | {"command": " ".join(sys.argv)}
    if "op" in options.parts:
        import speed_gpu

        results["op"] = speed_gpu.run(lambda partial: write_json(options.output, results | {"op": partial}), print)
    if "model" in options.parts:
        results["model"] = []
        for row in model_rows(options.batches, options.tokens):
            results["model"].append(row)
            print(row)
            write_json(options.output, results)
    write_json(options.output, results)


def model_rows(batches: list[int], tokens: int):
    """Yield one row for each variant and batch; a variant that fails gives a row with its error."""
    import speed_gpu_model

    for variant in speed_gpu_model.VARIANTS:
        model = speed_gpu_model.build(variant)
        for batch in batches:
            torch.compiler.reset()
            try:
                yield {"variant": variant, "batch": batch} | speed_gpu_model.measure(model, batch, tokens, repeats=3)
            except Exception as error:  # the other rows are still worth having
                yield {"variant": variant, "batch": batch, "error": repr(error)}
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
