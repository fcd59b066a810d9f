"""What plans must hold: packing, balance, the cap, and the time and memory of a whole epoch.

    python benchmarks/plan_goals.py

Lengths are log-normal, with the median of common chat sets; `plan_quality.py` looks at one set and
layout more closely. What depends on lengths alone has one value for each of its samples in place
of pairs.
"""

import itertools
import time
import tracemalloc

import numpy as np
from numpy.typing import NDArray
from shared import measures

from roll_sft.base.layout import ParallelLayout
from roll_sft.data.steps.packing import CostModel, best_fit_decreasing
from roll_sft.data.steps.plan import Planner, PlanOptions

COST = CostModel(70_450.0)  # of a 7B model
MILLION = 1_000_000
PACKAGES = "numpy"


def main() -> None:
    """Measures and prints one line for each."""
    _show("packing_rows", _packing(), goal="<= 1.002", denominator="ceil(tokens / cap)")
    dp_imbalance, pack_imbalance = _imbalances()
    _show("dp_imbalance", dp_imbalance, goal="<= 1.01", denominator="mean cost of a rank")
    _show("pack_imbalance", pack_imbalance, goal="<= 1.05", denominator="mean cost of a pack")
    _show("cap_violations", [_violations()], goal="<= 0", denominator="1,000 random batches")
    _show("tokens_kept", [_kept()], goal=">= 1", denominator="tokens of the samples; one epoch")
    seconds, num_bytes = _epochs()
    _show("epoch_plan_seconds", seconds, goal="<= 2", denominator="one CPU second, 1M samples")
    _show("epoch_plan_bytes", num_bytes, goal="<= 64", denominator="one sample of 1M")


def _show(name: str, ratios: list[float], *, goal: str, denominator: str) -> None:
    measures.show(name, ratios, goal=goal, denominator=denominator, packages=PACKAGES)


def _lengths(size: int, *, cap: int, seed: int, sigma: float = 1.05) -> NDArray[np.int32]:
    draws = np.random.default_rng(seed).lognormal(np.log(368), sigma, size)
    return np.clip(draws, 2, cap).astype(np.int32)


def _planner(lengths: NDArray[np.int32], *, batch: int, cap: int, data_size: int = 8) -> Planner:
    options = PlanOptions(
        seed=1,
        global_batch_size=batch,
        shuffle=True,
        packing=True,
        micro_batch_tokens=cap,
        layout=ParallelLayout(data_size),
        cost=COST,
    )
    return Planner(lengths, lengths, options=options)


def _packing() -> list[float]:
    """Rows over the fewest there can be, of 20,000 samples packed as one list."""
    ratios = []
    for cap in (2048, 8192, 32_768):
        lengths = _lengths(20_000, cap=cap, seed=7).tolist()
        rows = len(best_fit_decreasing(lengths, capacity=cap))
        ratios.append(rows / -(-sum(lengths) // cap))
    return ratios


def _imbalances() -> tuple[list[float], list[float]]:
    """Max over mean of ranks' costs, and of packs' within a rank that has several."""
    of_ranks, of_packs = [], []
    for seed, cap in itertools.product(range(9), (8192, 32_768)):
        lengths = _lengths(512, cap=cap, seed=100 + seed, sigma=1.2)
        plan = _planner(lengths, batch=512, cap=cap).step(1)
        of_ranks.append(plan.dp_imbalance)
        for rank in plan.ranks:
            costs = [sum(COST.of_all(lengths[list(pack)].tolist())) for pack in rank]
            if len(costs) > 1:
                of_packs.append(max(costs) * len(costs) / sum(costs))
    return of_ranks, of_packs


def _violations() -> float:
    found, draw = 0, np.random.default_rng(0)
    for seed in range(1000):
        cap, size = int(draw.integers(512, 16_384)), int(draw.integers(1, 300))
        lengths = _lengths(size, cap=cap, seed=seed, sigma=1.5)
        plan = _planner(lengths, batch=size, cap=cap, data_size=int(draw.integers(1, 17))).step(1)
        packs = [pack for rank in plan.ranks for pack in rank]
        found += sum(int(lengths[list(pack)].sum()) > cap for pack in packs if pack)
    return float(found)


def _kept() -> float:
    """Tokens of all steps of an epoch over those of its samples."""
    lengths = _lengths(20_000, cap=8192, seed=3)
    planner = _planner(lengths, batch=512, cap=8192)
    steps = range(1, planner.steps_per_epoch + 1)
    return sum(planner.step(step).total_tokens for step in steps) / int(lengths.sum())


def _epochs() -> tuple[list[float], list[float]]:
    """CPU seconds to plan every step of an epoch, and bytes a sample on the way, inputs counted."""
    seconds, num_bytes = [], []
    lengths = _lengths(MILLION, cap=8192, seed=0)
    for _ in range(3):
        started = time.process_time()
        planner = _planner(lengths, batch=512, cap=8192)
        for step in range(1, planner.steps_per_epoch + 1):
            planner.step(step)
        seconds.append(time.process_time() - started)
        tracemalloc.start()
        _planner(lengths, batch=512, cap=8192).step(1)
        num_bytes.append(8 + tracemalloc.get_traced_memory()[1] / MILLION)
        tracemalloc.stop()
    return seconds, num_bytes


if __name__ == "__main__":
    main()
