"""How well steps are packed and balanced, and how long planning takes; prints one JSON line.

    python benchmarks/plan_quality.py
    python benchmarks/plan_quality.py --lengths lengths.npy --data-size 64 --global-batch-size 4096

Without a file, lengths are log-normal with the median of common chat sets. `packing_efficiency` is
real tokens over the capacity of all micro-batches. What is missing to 1 is mostly the remainder of
every rank and step, which costs a launch and no padding; `fewest_micro_batches` is a bound that
ignores it. `padding_efficiency` is real over padded tokens. `dp_imbalance_over_bound` compares
with what no plan can beat: the costliest sample alone on its rank.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roll_sft.base.layout import ParallelLayout, round_up
from roll_sft.data.steps.packing import CostModel, best_fit_decreasing
from roll_sft.data.steps.plan import Planner, PlanOptions

MILLION = 1_000_000


def main() -> None:
    """Parses the arguments, measures, prints."""
    options = _arguments()
    if options.lengths:
        lengths = np.load(options.lengths).astype(np.int32)
    else:
        lengths = _log_normal(options.num_samples, options)
    line = {
        "name": "plan_quality",
        "num_samples": int(lengths.size),
        "data_size": options.data_size,
        "context_size": options.context_size,
        "global_batch_size": options.global_batch_size,
        "micro_batch_tokens": options.micro_batch_tokens,
        "cost_linear": options.cost_linear,
        **_quality(lengths, options),
        **_timing(options),
        "device": "cpu",
        "versions": {"numpy": np.__version__},
    }
    print(json.dumps(line))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=Path, help=".npy file of sample lengths in tokens")
    parser.add_argument("--num-samples", type=int, default=32_768)
    parser.add_argument("--median", type=float, default=368.0, help="of the log-normal lengths")
    parser.add_argument("--sigma", type=float, default=1.05, help="of the log-normal lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-size", type=int, default=8)
    parser.add_argument("--context-size", type=int, default=1)
    parser.add_argument("--global-batch-size", type=int, default=512)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--cost-linear", type=float, default=70_450.0, help="default: a 7B model")
    return parser.parse_args()


def _log_normal(size: int, options: argparse.Namespace) -> NDArray[np.int32]:
    draws = np.random.default_rng(options.seed).lognormal(
        np.log(options.median), options.sigma, size
    )
    # Below the cap by one alignment, so that every sample still fits after padding.
    longest = options.micro_batch_tokens - 2 * options.context_size
    return np.clip(draws, 2, longest).astype(np.int32)


def _planner(lengths: NDArray[np.int32], options: argparse.Namespace) -> Planner:
    plan_options = PlanOptions(
        seed=options.seed,
        global_batch_size=options.global_batch_size,
        shuffle=True,
        packing=True,
        micro_batch_tokens=options.micro_batch_tokens,
        layout=ParallelLayout(
            options.data_size * options.context_size, context_size=options.context_size
        ),
        cost=CostModel(options.cost_linear),
    )
    return Planner(lengths, lengths, options=plan_options)


def _quality(lengths: NDArray[np.int32], options: argparse.Namespace) -> dict[str, float]:
    """Packing and balance over one epoch."""
    planner = _planner(lengths, options)
    started = time.perf_counter()
    plans = [planner.step(step) for step in range(1, planner.steps_per_epoch + 1)]
    elapsed = time.perf_counter() - started
    real = sum(plan.total_tokens for plan in plans)
    padded = sum(plan.total_tokens_including_padding for plan in plans)
    num_micro_batches = sum(len(rank) for plan in plans for rank in plan.ranks)
    fewest = sum(
        max(options.data_size, -(-plan.total_tokens // options.micro_batch_tokens))
        for plan in plans
    )
    cost = CostModel(options.cost_linear)
    bounds = []
    for plan in plans:
        costs = [
            cost(round_up(n, 2 * options.context_size if options.context_size > 1 else 1))
            for n in lengths[list(plan.sample_ids)].tolist()
        ]
        bounds.append(max(1.0, max(costs) * options.data_size / sum(costs)))
    imbalances = [plan.dp_imbalance for plan in plans]
    excess = [one / bound for one, bound in zip(imbalances, bounds, strict=True)]
    return {
        "packing_efficiency": round(real / (num_micro_batches * options.micro_batch_tokens), 4),
        "padding_efficiency": round(real / padded, 4),
        "num_micro_batches": num_micro_batches,
        "fewest_micro_batches": fewest,
        "dp_imbalance_mean": round(float(np.mean(imbalances)), 5),
        "dp_imbalance_max": round(max(imbalances), 5),
        "dp_imbalance_over_bound_max": round(max(excess), 5),
        "step_ms": round(elapsed / len(plans) * 1e3, 3),
    }


def _timing(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of wall time for a million samples: the first plan, and packing them all at once."""
    lengths = _log_normal(MILLION, options)
    started = time.perf_counter()
    _planner(lengths, options).step(1)
    planned = time.perf_counter()
    as_list = lengths.tolist()
    bins = best_fit_decreasing(as_list, capacity=options.micro_batch_tokens)
    packed = time.perf_counter()
    efficiency = sum(as_list) / (len(bins) * options.micro_batch_tokens)
    return {
        "planner_1m_s": round(planned - started, 3),
        "best_fit_1m_s": round(packed - planned, 3),
        "best_fit_1m_efficiency": round(efficiency, 5),
    }


if __name__ == "__main__":
    main()
