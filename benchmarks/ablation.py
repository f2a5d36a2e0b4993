"""Switch parts of the method on and off at one budget.

    python benchmarks/ablation.py --model small --jobs 8 --seeds 0 1 --output ablation.json

A row whose field `SABQuantizationConfig` does not have is named as not run. See README.md.
"""

from collections.abc import Sequence

from fidelity import arguments, run
from methods import OURS, bits_with_residual_columns
from runner import Job
from tables import FULL_PRECISION

VARIANTS: dict[str, dict] = {
    "as it is": {},
    "budget: uniform": {"budget": "uniform"},
    "map: the paper's": {"significance": "paper"},
    "Λ = 1": {"significance": "none"},
    "refinement of scales only": {"refine_latent_rate": 1e-9},
    "not refined": {"refine_steps": 0},
    "not refined, budget: uniform": {"refine_steps": 0, "budget": "uniform"},
    "not refined, map: the paper's": {"refine_steps": 0, "significance": "paper"},
    "not refined, Λ = 1": {"refine_steps": 0, "significance": "none"},
    "not refined, balance: token count": {"refine_steps": 0, "modality_balance": "tokens"},
    "not refined, balance: text only": {"refine_steps": 0, "modality_balance": "text"},
    "not refined, elementwise fit": {"refine_steps": 0, "fit": "elementwise"},
    "refinement 100 steps": {"refine_steps": 100},
    "balance: token count": {"modality_balance": "tokens"},
    "balance: text only": {"modality_balance": "text"},
    "refinement weighted by gradients": {"refine_loss": "gradient"},
    "elementwise fit": {"fit": "elementwise"},
    "latent rate 1e-2": {"refine_latent_rate": 1e-2},
    "latent rate 4e-2": {"refine_latent_rate": 4e-2},
    "scale rate 1e-3": {"refine_scale_rate": 1e-3},
    "refinement 800 steps": {"refine_steps": 800},
}
"""Name → fields that differ from `DEFAULTS`."""
DEFAULTS = {"refine_steps": 400, "distil_steps": 0}
MANY_BITS = 3.1
MANY_BITS_VARIANTS: dict[str, dict] = {
    "3.1 bits, refinement 800 steps": {"refine_steps": 800},
    "3.1 bits": {},
    "3.1 bits, latent rate 1e-2": {"refine_latent_rate": 1e-2},
    "3.1 bits, latent rate 5e-3": {"refine_latent_rate": 5e-3},
}
NUM_FIRST = 5  # variants that run before the first numbers of samples
RESIDUAL_SHARES = (0.0, 0.1, 0.25)
SAMPLE_COUNTS = (128, 4096, 32, 512, 2048)


def list_jobs(model: str, bits: float, seeds: Sequence[int]) -> list[Job]:
    """Return all rows, seed after seed. bits: of the rows that are not about bits; model: folder."""
    budgets = {share: bits_with_residual_columns(model, share) for share in RESIDUAL_SHARES}
    bits = max(bits, budgets[0.0])
    jobs = [Job(FULL_PRECISION, FULL_PRECISION)]
    for seed in seeds:
        variants = [Job(name, OURS, seed, bits, DEFAULTS | options) for name, options in VARIANTS.items()]
        samples = [Job(f"{count} samples", OURS, seed, bits, DEFAULTS, count) for count in SAMPLE_COUNTS]
        samples.append(Job("4096 samples, 800 steps", OURS, seed, bits, DEFAULTS | {"refine_steps": 800}, 4096))
        jobs += variants[:NUM_FIRST] + samples[:2] + variants[NUM_FIRST:] + samples[2:]
        jobs += [Job(name, OURS, seed, MANY_BITS, DEFAULTS | more) for name, more in MANY_BITS_VARIANTS.items()]
        jobs += [Job(f"residual columns {100 * s:.0f} %", OURS, seed, b, DEFAULTS) for s, b in budgets.items()]
    return jobs


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = arguments(__doc__)
    parser.add_argument("--bits", type=float, default=1.1, help="budget of the rows that are not about bits")
    args = parser.parse_args(argv)
    run(list_jobs(args.model, args.bits, args.seeds), args)


if __name__ == "__main__":
    main()
