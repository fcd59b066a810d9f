"""What a run says it needs in memory, by hand and beside what an engine holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import Qwen2Config

from roll_sft.config.build import build_config
from roll_sft.config.lora import LoraConfig
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.job.in_process import prepare_job
from roll_sft.job.job import micro_batch_tokens
from roll_sft.job.memory import GIB, estimate, warn_of_memory
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import family_of
from tests import parity
from tests.pool import RankPool

TOKENS, WORDS = 8192, 151_936
HALF_B = Qwen2Config(
    vocab_size=WORDS,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=32_768,
    tie_word_embeddings=True,
    architectures=["Qwen2ForCausalLM"],
)
TP2 = {"num_workers": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}
KEPT = 4 * 896 + 3 * (896 + 128) + 3 * 4864  # numbers that a layer keeps of a token
GRADIENTS = TOKENS * (2 * 896 + 3 * 4864)  # at the widest moment of its backward, the MLP's


class Run(NamedTuple):
    config: RunConfig
    shape: ModelShape


def plan_of(
    recompute: str | list[str] = "none",
    dtype: str = "bf16",
    is_compiled: bool | None = None,
    **parallel: Any,
) -> Run:
    config = build_config(
        {
            "model": {"dtype": dtype, "compile": is_compiled},
            "parallel": {"num_workers": 1, **parallel},
            "train": {"micro_batch_tokens": TOKENS, "recompute": recompute},
        }
    )
    shape = family_of(HALF_B).shape(HALF_B)
    return Run(config, shape)


def kept_of(shape: ModelShape, *, of_mlp: int) -> int:
    """`KEPT` of any shape with as many query heads as fill its width."""
    keys = shape.num_key_value_heads * shape.head_dim
    return 4 * shape.hidden_size + 3 * (shape.hidden_size + keys) + of_mlp * shape.ffn_hidden_size


def test_the_memory_of_a_small_model_on_one_gpu_is_the_sum_done_by_hand() -> None:
    plan = plan_of()
    assert kept_of(plan.shape, of_mlp=3) == KEPT
    found = estimate(*plan)
    assert found.state_gib == pytest.approx(494_032_768 * (2 + 4 + 4 + 8) / GIB, rel=1e-3)
    assert found.activations_gib == pytest.approx(24 * TOKENS * KEPT * 2 / GIB)
    assert found.backward_gib == pytest.approx(GRADIENTS * 2 / GIB)
    # 2048 rows of logits and their gradient, rows and theirs, what enters and leaves the last norm;
    # the weight's gradient is in the buffer.
    head = 2048 * WORDS * (2 + 2) + 4 * TOKENS * 896 * 2
    assert found.head_gib == pytest.approx(head / GIB)
    assert found.update_gib == 0.0  # one kernel, in place
    assert found.backward_gib < found.head_gib  # of the two moments the wider counts
    assert found.total_gib == found.state_gib + found.activations_gib + found.head_gib


def test_full_recomputation_keeps_what_enters_a_layer_and_one_layer() -> None:
    found = estimate(*plan_of("full"))
    in_fp32 = estimate(*plan_of("full", dtype="fp32"))
    for half, width in ((found, 2), (in_fp32, 4)):
        assert half.activations_gib == pytest.approx(TOKENS * 24 * 896 * width / GIB)
        again = TOKENS * KEPT + GRADIENTS
        assert half.backward_gib == pytest.approx(again * width / GIB)


def test_a_part_that_is_recomputed_is_kept_once_where_the_backward_is() -> None:
    once = {"core_attn": 0, "mlp": 3 * 4864, "layernorm": 896}  # there again beside the MLP's
    dropped = {"core_attn": 128, "mlp": 3 * 4864, "layernorm": 2 * 896}
    for modules in (["core_attn"], ["mlp"], ["layernorm"], ["layernorm", "mlp"]):
        less, again = (sum(table[name] for name in modules) for table in (dropped, once))
        found = estimate(*plan_of(modules))
        numbers = 24 * TOKENS * (KEPT - less)
        assert found.activations_gib == pytest.approx(numbers * 2 / GIB)
        assert found.backward_gib == pytest.approx((TOKENS * again + GRADIENTS) * 2 / GIB)
    assert estimate(*plan_of("selective")) == estimate(*plan_of(["core_attn"]))
    assert estimate(*plan_of([])) == estimate(*plan_of())
    context = {"num_workers": 2, "context_parallel_size": 2}
    whole, kept = (estimate(*plan_of(how, **context)) for how in ("none", "selective"))
    # The keys and values that two chunks see go; the projection, and the queries' copy, stay.
    gathered = 24 * TOKENS // 2 * (2 * 128 * 5 // 2 - (896 + 2 * 128))
    assert whole.activations_gib - kept.activations_gib == pytest.approx(gathered * 2 / GIB)


def test_op_by_op_more_is_kept_of_the_mlp_and_of_the_head() -> None:
    compiled, plain = estimate(*plan_of()), estimate(*plan_of(is_compiled=False))
    more = 24 * TOKENS * 2 * 4864 * 2 / GIB
    assert plain.activations_gib - compiled.activations_gib == pytest.approx(more)
    assert plain.head_gib - compiled.head_gib == pytest.approx(2048 * WORDS * (6 - 4) / GIB)
    on_cpu = estimate(*plan_of(device="cpu"))
    assert on_cpu.activations_gib == plain.activations_gib
    of_weight = 2 * 896 * 4864 * 2 / GIB  # which a GPU adds to the buffer at once
    assert on_cpu.backward_gib == pytest.approx(plain.backward_gib + of_weight)
    rows = 4 * TOKENS * 896 * 2  # chunks are small, and the weight's gradient is there twice
    assert on_cpu.head_gib == pytest.approx((512 * WORDS * 6 + rows + WORDS * 896 * 4) / GIB)


def test_each_axis_cuts_its_part() -> None:
    one = estimate(*plan_of())
    tensor = estimate(*plan_of(**TP2))
    assert tensor.state_gib == pytest.approx(one.state_gib / 2, rel=1e-3)
    assert tensor.activations_gib == one.activations_gib / 2
    assert one.backward_gib / 2 < tensor.backward_gib < 0.6 * one.backward_gib
    data = estimate(*plan_of(num_workers=4))
    assert data.state_gib == pytest.approx(one.state_gib * (2 + 4 + 12 / 4) / 18)
    assert data.activations_gib == one.activations_gib
    whole = estimate(*plan_of(num_workers=4, use_distributed_optimizer=False))
    assert whole.state_gib == one.state_gib
    context = estimate(*plan_of(num_workers=2, context_parallel_size=2))
    # Nothing as projected; of two chunks in four, the first's keys or the last's: 5 for 2 tokens.
    share = (KEPT - (896 + 2 * 128) - 128 + 2 * 128 * 5 / 2) / KEPT
    assert context.activations_gib == pytest.approx(one.activations_gib / 2 * share)


def test_the_first_stage_holds_a_micro_batch_for_every_stage_and_the_last_the_head() -> None:
    one, two = (
        estimate(*plan_of()),
        estimate(*plan_of(num_workers=2, pipeline_model_parallel_size=2)),
    )
    # Half of the layers, twice in flight, and the embedding: the first is the fuller.
    assert two.activations_gib == one.activations_gib
    assert two.head_gib == 0
    interleaved = estimate(
        *plan_of(
            num_workers=2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
        )
    )
    chunks = 2 + 2 + 1  # of six layers: on the way to the last stage, one more turn, and its own
    numbers = chunks * 6 * TOKENS * KEPT
    assert interleaved.activations_gib == pytest.approx(numbers * 2 / GIB)
    full = estimate(*plan_of("full", num_workers=2, pipeline_model_parallel_size=2))
    assert full.head_gib == one.head_gib  # with little else in flight, the last is the fuller


def test_where_packs_are_short_the_update_needs_the_most_on_a_cpu() -> None:
    plan = plan_of(device="cpu")
    short = replace(
        plan.config,
        train=replace(plan.config.train, micro_batch_tokens=64),
        data=replace(plan.config.data, sequence_length=64),
    )
    found = estimate(short, plan.shape)
    assert found.update_gib == pytest.approx(494_032_768 * 4 / GIB, rel=1e-3)
    assert found.total_gib == found.state_gib + found.update_gib


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    parity.write_model(root / "model", kind="qwen2-tied", num_layers=4)
    parity.write_rows(root / "rows.jsonl")
    return root


def bytes_held(config: RunConfig) -> tuple[int, int, int]:
    """Of the state after a step, of what a layer keeps, and the tokens of that. In a pool."""
    import torch.distributed as dist

    from roll_sft.engine.engine import Engine

    job = prepare_job(config)
    engine = Engine(config, source=job.source, data=job.data)
    data_rank = job.layout.coordinate(dist.get_rank()).data_rank
    work = job.planner.step(1).work_for(data_rank, learning_rate=1e-4)
    engine.train_step(work)
    pack = engine.build(job.data.train, work.micro_batches[:1])
    tensors = [*engine.chunks[0].parameters()]
    buffers = [each for c in engine._wrapped for each in (*c.buffers, *c.expert_parallel_buffers)]
    tensors += [buffer.grad_data for buffer in buffers]
    for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        tensors += [p for group in part.optimizer.param_groups for p in group["params"]]
        tensors += [t for state in part.optimizer.state.values() for t in state.values()]
    held = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    state = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    return state, _kept_by_layer(engine, pack, held), pack[0].pack.tokens_T.shape[1]


def _kept_by_layer(engine: Any, pack: Any, held: dict[int, Any]) -> int:
    """Bytes that the second layer keeps for the backward of `pack`, each once."""
    import torch

    kept: dict[int, torch.Tensor] = {}
    num_bytes = 0
    layer = engine.chunks[0].decoder.layers[1]
    forward = layer.forward

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in held:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def watched(*args: Any, **options: Any) -> Any:
        nonlocal num_bytes
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = forward(*args, **options)
        # Now: what is freed until the backward has its size again behind it.
        num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        return output

    layer.forward = watched
    engine.accumulate_gradients(pack)
    return num_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "parallel", "recompute"),
    [
        ("fp32", {}, []),
        ("bf16", {"num_workers": 2}, []),
        ("bf16", {"use_distributed_optimizer": False, **TP2}, []),
        ("fp32", {"num_workers": 2, "pipeline_model_parallel_size": 2}, []),
        ("fp32", {}, ["mlp", "layernorm"]),
    ],
    ids=["1 fp32", "DP2 bf16", "TP2+SP bf16", "PP2 fp32", "mlp and layernorm recomputed"],
)
def test_an_engine_holds_what_was_estimated(
    dtype: str, parallel: dict[str, Any], recompute: list[str], folder: Path, pool: RankPool
) -> None:
    config = parity.parity_config(
        folder,
        model={"dtype": dtype},
        parallel={"num_workers": 1, **parallel},
        train={"recompute": recompute},
    )
    plan = Run(config, prepare_job(config).source.shape)
    found = pool.run(bytes_held, layout_of(config.parallel), config)
    fullest = max(state for state, _, _ in found)
    assert estimate(*plan).state_gib * GIB == pytest.approx(fullest, rel=0.01)
    if dtype == "fp32":
        shape = plan.shape
        # On a CPU a norm is two steps, and attention is joined from its samples'.
        least = kept_of(shape, of_mlp=5) + 2 * shape.hidden_size + shape.hidden_size
        if recompute:  # nothing of the MLP, and of norms what enters them
            least = kept_of(shape, of_mlp=0) - 2 * shape.hidden_size + shape.hidden_size
        angles, scales = 4 * shape.head_dim, 2 + shape.num_attention_heads
        for _, kept, tokens in found:
            assert least <= kept / tokens / 4 <= least + angles + scales


@pytest.mark.slow
def test_an_engine_with_experts_on_two_ranks_holds_what_was_estimated(
    folder: Path, pool: RankPool
) -> None:
    """The state, and what a layer keeps of a token where experts get unlike numbers of them."""
    config = parity.parity_config(
        parity.home_of(folder, "qwen3moe"),
        parallel={"num_workers": 2, "expert_model_parallel_size": 2},
        train={"recompute": "none"},
    )
    plan = Run(config, prepare_job(config).source.shape)
    found, wanted = pool.run(bytes_held, layout_of(config.parallel), config), estimate(*plan)
    for state, _, _ in found:
        assert wanted.state_gib * GIB == pytest.approx(state, rel=0.01)
    kept, tokens = (sum(rank[index] for rank in found) for index in (1, 2))
    of_token = wanted.activations_gib * GIB / plan.shape.num_layers
    assert of_token / micro_batch_tokens(config, layout_of(config.parallel)) == pytest.approx(
        kept / tokens, rel=0.15
    )


def test_a_run_that_needs_more_than_is_free_is_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = parity.parity_config(folder)
    shape = prepare_job(config).source.shape
    needed = estimate(config, shape).total_gib
    warn_of_memory(config, shape, needed * 1.01)
    assert not caplog.records
    warn_of_memory(config, shape, needed * 0.99)
    assert f"{needed:.1f} GiB" in caplog.text
    assert "train.micro_batch_tokens" in caplog.text


@pytest.mark.parametrize("parallel", [{}, TP2], ids=["1", "TP2"])
def test_a_base_in_nf4_takes_its_codes_and_one_weight_at_a_time(parallel: dict[str, Any]) -> None:
    run = plan_of(**parallel)
    plain, quantized = (
        estimate(replace(run.config, lora=LoraConfig(rank=8, quantize_base=base)), run.shape)
        for base in ("none", "nf4")
    )
    ranks = layout_of(run.config.parallel).tensor_size
    widest = 2 * 4864 * 896 / ranks
    numbers = 24 * (896 * (2 * 896 + 2 * 128) / ranks + 1.5 * widest)
    saved = (plain.state_gib - quantized.state_gib) * GIB
    assert 1 - saved / (2 * numbers) == pytest.approx(0.5 * (0.5 + 1 / 64), rel=0.03)
    added = (quantized.backward_gib - plain.backward_gib) * GIB
    assert added == pytest.approx(2 * widest)
