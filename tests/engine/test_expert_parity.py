"""Models with experts against transformers + AdamW, step by step, at every layout.

Steps are compared with transformers in float64: in float32 the kernels of a CPU decide which expert
gets a token where two scores are all but equal, in transformers as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.job.in_process import prepare_job
from roll_sft.parity.oracle import token_losses
from tests import parity
from tests.pool import RankPool

pytestmark = pytest.mark.slow

SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP, CP = {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}
LAYOUTS: dict[str, Mapping[str, Any]] = {
    "1": {"num_workers": 1},
    "EP2": {"num_workers": 2, "expert_model_parallel_size": 2},
    "TP2+SP": {"num_workers": 2, **SP},
    "TP2xEP2+SP": {"num_workers": 2, "expert_model_parallel_size": 2, **SP},
    "PP2": {"num_workers": 2, **PP},
    "CP2xEP2": {"num_workers": 2, "expert_model_parallel_size": 2, **CP},
    "DP2": {"num_workers": 2},
    "EP2xDP2": {"num_workers": 4, "expert_model_parallel_size": 2},
    "EP4": {"num_workers": 4, "expert_model_parallel_size": 4},
    "EP2xPP2": {"num_workers": 4, "expert_model_parallel_size": 2, **PP},
    "TP2xDP2xEP4+SP": {"num_workers": 4, "expert_model_parallel_size": 4, **SP},
    "TP2xPP2xEP2+SP": {"num_workers": 4, "expert_model_parallel_size": 2, **SP, **PP},
    "TP2xCP2xEP4+SP": {"num_workers": 4, "expert_model_parallel_size": 4, **SP, **CP},
    "EP2xPP2x2": {
        "num_workers": 4,
        "expert_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        **PP,
    },
}
LOSS_TOLERANCE = {True: 2e-6, False: 1e-6}  # with the auxiliary loss, and without
NORM_TOLERANCE = 5e-5
TIMES_OF_TRANSFORMERS = 4.0  # our distance from float64, in terms of transformers' own


@dataclass(frozen=True)
class Case:
    kind: str
    layout: str
    packing: bool = True
    capacity: int = 1  # micro_batch_tokens in units of sequence_length
    recompute: Any = "none"
    overlaps: bool = False
    z_loss: float = 0.0
    aux_loss: float | None = None  # its coefficient, by default the model's
    compiled: bool = False

    @property
    def name(self) -> str:
        packing = "packed" if self.packing else "single"
        more = "" if self.recompute == "none" else f"-{self.recompute}"
        more += "-overlap" * self.overlaps + "-z" * bool(self.z_loss)
        more += "" if self.aux_loss is None else f"-aux{self.aux_loss}"
        more += "-compiled" * self.compiled
        return f"{self.kind}-{self.layout}-{packing}-{self.capacity}x{more}"


KINDS = tuple(parity.EXPERTS)
ALL = [
    Case(kind, layout, packing=(row + column) % 3 != 0, capacity=1 if (row + column) % 2 else 4)
    for row, layout in enumerate(LAYOUTS)
    for column, kind in enumerate(KINDS)
] + [
    Case("qwen3moe", "EP2", recompute="full"),
    Case("qwen2moe", "EP2xPP2", recompute="full"),
    Case("mixtral", "TP2xEP2+SP", recompute=["core_attn", "mlp", "layernorm"]),
    Case("qwen2moe", "EP2", overlaps=True),
    Case("qwen3moe", "EP2xPP2x2", overlaps=True),
    Case("mixtral", "TP2xPP2xEP2+SP", z_loss=0.05, recompute="full"),
    Case("gptoss", "CP2xEP2", z_loss=0.05, packing=False),
    *(Case(kind, "EP2", aux_loss=0.0) for kind in ("mixtral", "qwen3moe")),
    Case("gptoss", "EP2xPP2", aux_loss=0.0),
    Case("qwen2moe", "TP2xEP2+SP", aux_loss=0.0),
    Case("olmoe", "CP2xEP2", aux_loss=0.3),
    *(Case(kind, "1", packing=False, compiled=True) for kind in ("olmoe", "gptoss", "qwen2moe")),
    Case("deepseekv3-plain", "1"),
    Case("deepseekv3-plain", "TP2xPP2xEP2+SP", recompute=["core_attn", "mlp", "layernorm"]),
]
SUBSET = [
    Case("qwen3moe", "EP2", z_loss=0.05),
    Case("mixtral", "TP2xEP2+SP", packing=False),
    Case("qwen2moe", "PP2"),
    Case("deepseekv3", "TP2xEP2+SP"),
    Case("gptoss", "TP2xEP2+SP"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = ALL if metafunc.config.getoption("--all-layouts") else SUBSET
        metafunc.parametrize("case", cases, ids=lambda case: case.name)
    if "kind" in metafunc.fixturenames:
        is_full = metafunc.config.getoption("--all-layouts")
        metafunc.parametrize("kind", KINDS if is_full else ["gptoss"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows; `parity.home_of` adds a model of a kind."""
    root = tmp_path_factory.mktemp("experts")
    parity.write_rows(root / "rows.jsonl")
    return root


@cache
def reference(
    home: Path, z_loss: float, aux_loss: float | None, dtype: torch.dtype
) -> tuple[list[dict[str, float]], torch.Tensor]:
    config = parity.parity_config(home, moe={"z_loss_coef": z_loss, "aux_loss_coef": aux_loss})
    return parity.reference_run(prepare_job(config), dtype)


def test_every_step_equals_transformers_and_so_does_the_exported_model(
    case: Case, folder: Path, pool: RankPool, tmp_path: Path
) -> None:
    home = parity.home_of(folder, case.kind)
    config = parity.parity_config(
        home,
        parallel={**LAYOUTS[case.layout], "overlap_param_gather": case.overlaps or None},
        model={"compile": case.compiled},
        data={"packing": case.packing},
        train={"micro_batch_tokens": 200 * case.capacity, "recompute": case.recompute},
        moe={"z_loss_coef": case.z_loss, "aux_loss_coef": case.aux_loss},
    )
    job = prepare_job(config)
    _, logits = reference(home, case.z_loss, case.aux_loss, torch.float32)
    wanted, exact = reference(home, case.z_loss, case.aux_loss, torch.float64)
    staging = tmp_path / "checkpoints" / ".staging_00000008"
    staging.mkdir(parents=True)
    ranks = pool.run(parity.engine_run, layout_of(config.parallel), config, staging)
    (steps,) = [rank for rank in ranks if rank is not None]
    model = parity.export_run(job, staging, tmp_path / "hf")
    errors = {
        **{key: parity.worst(steps, wanted, key) for key in wanted[0]},
        "logits": float((parity.model_logits(model) - exact).abs().max()),
        "their logits": float((logits - exact).abs().max()),
    }
    print(f"parity {case.name}", {name: f"{value:.1e}" for name, value in errors.items()})
    assert len(steps) == 8
    assert errors["loss"] < LOSS_TOLERANCE[parity.balance_coefficient(job) > 0]
    assert errors["grad_norm"] < NORM_TOLERANCE
    assert errors.get("z_loss", 0.0) < LOSS_TOLERANCE[True]
    assert errors["logits"] < TIMES_OF_TRANSFORMERS * errors["their logits"]


def test_a_data_rank_with_fewer_samples_keeps_no_other_waiting(
    folder: Path, pool: RankPool
) -> None:
    """Ranks exchange tokens in every micro-batch: of five samples, three ranks of four lack one."""
    home = parity.home_of(folder, "qwen3moe")
    config = parity.parity_config(
        home,
        parallel=LAYOUTS["EP2xDP2"],
        data={"packing": False},
        train={"global_batch_size": 5, "max_steps": 2},
    )
    job = prepare_job(config)
    for step in (1, 2):
        samples = [sum(map(len, rank)) for rank in job.planner.step(step).ranks]
        assert (min(samples), max(samples), sum(samples)) == (1, 2, 5)
    (steps,) = [rank for rank in pool.run(parity.engine_run, job.layout, config, None) if rank]
    wanted, _ = parity.reference_run(job, torch.float64)
    assert parity.worst(steps, wanted, "loss") < LOSS_TOLERANCE[True]
    assert parity.worst(steps, wanted, "grad_norm") < NORM_TOLERANCE


def first_gradients(config: RunConfig) -> dict[str, torch.Tensor]:
    """The gradients of step 1 of routers, of sinks, and of experts' biases. In a pool."""
    import torch.distributed as dist

    from roll_sft.engine.build import named_parameters
    from roll_sft.engine.engine import Engine

    job = prepare_job(config)
    engine = Engine(config, source=job.source, data=job.data)
    data_rank = job.layout.coordinate(dist.get_rank()).data_rank
    work = job.planner.step(1).work_for(data_rank, learning_rate=0.0)
    engine.accumulate_gradients(engine.build(job.data.train, work.micro_batches))
    return {
        name: parameter.main_grad.clone()
        for name, parameter in named_parameters(engine.chunks)
        if parameter.requires_grad
        and (".router." in name or "softmax_offset" in name or name.endswith("experts.down.bias"))
    }


def test_gradients_of_routers_sinks_and_biases_equal_transformers(
    kind: str, folder: Path, pool: RankPool
) -> None:
    """Packed, with samples longer than the window, and experts and samples on two ranks."""
    home = parity.home_of(folder, kind)
    config = parity.parity_config(
        home,
        parallel={**LAYOUTS["EP2"], "use_distributed_optimizer": False},
        train={"micro_batch_tokens": 800},
    )
    job = prepare_job(config)
    ranks = pool.run(first_gradients, layout_of(config.parallel), config)
    model = AutoModelForCausalLM.from_pretrained(home / "model", attn_implementation="eager")
    model.set_experts_implementation("eager")
    plan = job.planner.step(1)
    assert max(job.data.train.lengths[list(plan.sample_ids)]) > 24
    if parity.balance_coefficient(job):
        parity.balanced_backward(job, model, plan.sample_ids, plan.supervised_tokens)
    else:
        for index in plan.sample_ids:
            losses = token_losses(model, *job.data.train.sample(index))
            (losses.sum() / plan.supervised_tokens).backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    shape = job.source.shape
    table = job.source.family.weights(shape)
    # A router; gpt-oss has biases of routers and of experts, and sinks.
    assert len(ranks[0]) == shape.num_expert_layers * (4 if kind == "gptoss" else 1)
    for name, found in ranks[0].items():
        if name.endswith("experts.down.bias"):
            found = torch.cat([rank[name] for rank in ranks])
        ((hf_name, _),) = table[name].hf_shapes.items()
        right = wanted[hf_name.replace("block_sparse_moe", "mlp")]  # as transformers 5 calls it
        assert right is not None
        assert float(right.abs().max()) > 1e-4
        torch.testing.assert_close(found, right, rtol=2e-5, atol=2e-6 * float(right.abs().max()))


def biases_after_a_step(config: RunConfig) -> dict[str, torch.Tensor]:
    """The biases of scores after step 1. In a pool."""
    import torch.distributed as dist

    from roll_sft.engine.build import named_parameters
    from roll_sft.engine.engine import Engine

    job = prepare_job(config)
    engine = Engine(config, source=job.source, data=job.data)
    data_rank = job.layout.coordinate(dist.get_rank()).data_rank
    engine.train_step(job.planner.step(1).work_for(data_rank, learning_rate=0.0))
    found = named_parameters(engine.chunks)
    return {name: each.detach() for name, each in found if name.endswith("score_bias")}


def test_biases_of_scores_move_by_the_load_of_the_global_batch(
    folder: Path, pool: RankPool
) -> None:
    home, rate = parity.home_of(folder, "glm4moe"), 0.01
    config = parity.parity_config(
        home, parallel=LAYOUTS["EP2"], moe={"router_bias_update_rate": rate}
    )
    job = prepare_job(config)
    ranks = pool.run(biases_after_a_step, layout_of(config.parallel), config)
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    gates = {name: each for name, each in model.named_modules() if name.endswith("mlp.gate")}
    counts = {name: torch.zeros(8) for name in gates}

    def count(name: str, output: tuple[torch.Tensor, ...]) -> None:
        counts[name] += output[2].flatten().bincount(minlength=8)

    for name, gate in gates.items():
        gate.register_forward_hook(lambda _module, _inputs, output, name=name: count(name, output))
    with torch.no_grad():
        for index in job.planner.step(1).sample_ids:
            tokens, _ = job.data.train.sample(index)
            model(torch.from_numpy(tokens.astype("int64"))[None])
    table = job.source.family.weights(job.source.shape)
    for rank in ranks:
        assert len(rank) == 3
        for name, found in rank.items():
            ((hf_name, _),) = table[name].hf_shapes.items()
            gate = hf_name.rpartition(".")[0]
            before, load = gates[gate].e_score_correction_bias, counts[gate]
            assert load.min() < load.mean() < load.max()
            wanted = before + rate * (load.mean() - load).sign()
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)
