"""A run that generates and evaluates beside one that does not: the same steps, to the bit."""

import gc
import hashlib
import importlib
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from roll_sft.base.generation import GenerationRequest
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.job.in_process import prepare_job
from tests import parity
from tests.engine.test_generation import MORE_LAYOUTS, request
from tests.pool import RankPool

pytestmark = pytest.mark.slow

STEPS = 3
# Noise is drawn of torch's random state, dropout of a count of our own.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "noise": ("qwen2-tied", {"train": {"neftune_noise_alpha": 5.0}}),
    "lora-dropout": ("qwen2-tied", {"lora": {"dropout": 0.2}}),
    "overlap": ("qwen2", {"parallel": {"overlap_param_gather": True}}),
    "experts": ("qwen3moe", {}),
}
CASES = [
    *(
        (kind, layout)
        for kind in ("noise", "lora-dropout")
        for layout in ("1", "TP2", "PP2", "DP2")
    ),
    ("noise", "TP2+SP"),
    ("overlap", "DP2"),
    ("experts", "EP2"),
]
SUBSET = [("lora-dropout", "DP2")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = CASES if metafunc.config.getoption("--all-layouts") else SUBSET
        metafunc.parametrize("case", cases, ids="-".join)


def digest(tensors: Iterable[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for each in tensors:
        found.update(each.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def held_bytes() -> int:
    """Of all tensors that live in this process, but for those that Megatron keeps to use again.

    Under sequence parallelism Megatron gathers a pack into a buffer, which stays as large as the
    longest pack so far, of a training step as of an answer.
    """
    from megatron.core.parallel_state import get_global_memory_buffer

    gc.collect()
    kept = {each.data_ptr() for each in get_global_memory_buffer().buffer.values()}
    storages = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.device.type == "cpu":
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for place, size in storages.items() if place not in kept)


def everything(engine: Any) -> dict[str, Any]:
    """What training reads: weights, gradients, optimizer state, random states, modes."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    parameters = [each for chunk in engine.chunks for each in chunk.parameters()]
    state, step = engine._state()
    pieces = [held.piece.tensor for held in state.pieces]
    return {
        "weights": digest(parameters),
        "gradients": digest(each.main_grad for each in parameters if hasattr(each, "main_grad")),
        "state": digest(pieces),
        "step": step,
        "torch": digest([torch.get_rng_state()]),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "megatron": digest(get_cuda_rng_tracker().get_states().values()),
        "modes": [each.training for chunk in engine._wrapped for each in chunk.modules()],
        "requires_grad": [each.requires_grad for each in parameters],
    }


def trained(config: RunConfig, requests: list[GenerationRequest]) -> tuple[list[Any], Any]:
    """Metrics of each step, and the state after the last. In a pool.

    After each step `requests` are answered and the validation set is evaluated.
    """
    import torch.distributed as dist

    from roll_sft.engine.engine import Engine
    from roll_sft.engine.generation.generate import generate

    job = prepare_job(config)
    engine = Engine(config, source=job.source, data=job.data)
    data_rank = job.layout.coordinate(dist.get_rank()).data_rank
    told = []
    for step in range(1, STEPS + 1):
        plan = job.planner.step(step)
        metrics = engine.train_step(plan.work_for(data_rank, learning_rate=job.schedule.at(step)))
        told.append(metrics and (metrics.loss_sum, metrics.grad_norm))
        if requests:
            engine._gather_weights()
            before, held = everything(engine), held_bytes()
            for each in requests:
                generate(engine, each)
                # Less: the last pack's keys of dropout are let go.
                assert held_bytes() <= held, "generation holds memory"
            for chunk in job.validation["held_out"].evaluation():
                engine.evaluate("held_out", chunk.ranks[data_rank])
            after = everything(engine)
            changed = [name for name in before if before[name] != after[name]]
            assert not changed, f"step {step}: changed: {changed}"
    return told, everything(engine)


def test_the_steps_after_are_bitwise_those_without(
    case: tuple[str, str], tmp_path: Path, pool: RankPool
) -> None:
    kind, layout = case
    model, sections = KINDS[kind]
    parity.write_rows(tmp_path / "rows.jsonl")
    home = parity.home_of(tmp_path, model, num_layers=2)
    held_out = {"path": str(tmp_path / "rows.jsonl"), "name": "held_out"}
    given = {
        **sections,
        "data": {"validation": [held_out]},
        "parallel": {**MORE_LAYOUTS[layout], **sections.get("parallel", {})},
    }
    if "lora" in sections:
        config = importlib.import_module("tests.lora").lora_config(home, None, **given)
    else:
        config = parity.parity_config(home, **given)
    asked = [
        request(new_tokens=6),
        request(new_tokens=6, temperature=1.0, top_p=0.9),
    ]
    plain = pool.run(trained, layout_of(config.parallel), config, [])
    beside = pool.run(trained, layout_of(config.parallel), config, asked)
    assert plain == beside
