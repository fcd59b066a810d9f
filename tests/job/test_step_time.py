"""The time of a step: formulas beside a schedule that is played through, and their properties."""

from collections.abc import Collection
from dataclasses import astuple, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_sft.base.layout import ParallelLayout
from roll_sft.job.layouts import RECOMPUTE
from roll_sft.job.step_time import Machine, StepTime, Work, micro_batches, step_time
from roll_sft.models.shape import ModelShape

SHAPE = ModelShape(
    architecture="Qwen2ForCausalLM",
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    ffn_hidden_size=14336,
    vocab_size=128_256,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    qkv_bias=False,
    rotary_inv_freq=(),
    initializer_range=0.02,
)
INSTANT = Machine(node_bytes_per_s=1e30, network_bytes_per_s=1e30, collective_s=0.0)


def time_of(
    layout: ParallelLayout,
    work: Work,
    *,
    recompute: Collection[str] = "none",
    machine: Machine = Machine(),  # noqa: B008 -- frozen
) -> StepTime:
    return step_time(SHAPE, layout, work, recompute=recompute, machine=machine)


def played_through(stages: int, chunks: int, number: int) -> float:
    """Time of Megatron-Core's schedule of `number` micro-batches, a whole stage's forward being 1.

    A backward takes 2. Each stage does one thing at a time, in its own fixed order, and begins when
    the stage before, or for a backward the one behind, is done with the same micro-batch.
    """
    total, last = number * chunks, stages * chunks - 1
    forward = [
        (place % (stages * chunks) // stages, place // (stages * chunks) * stages + place % stages)
        for place in range(total)
    ]
    if chunks == 1:
        forward = [(0, place) for place in range(total)]
    backward = [(chunks - 1 - chunk, micro) for chunk, micro in forward]
    orders = []
    for stage in range(stages):
        behind = stages - 1 - stage
        ahead = behind if chunks == 1 else min(2 * behind + (chunks - 1) * stages, total)
        ahead = min(ahead, total)
        order = [("forward", *each) for each in forward[:ahead]]
        for place in range(total - ahead):
            order.append(("forward", *forward[ahead + place]))
            order.append(("backward", *backward[place]))
        order += [("backward", *each) for each in backward[total - ahead :]]
        orders.append(order)
    done: dict[tuple[str, int, int], float] = {}  # kind, stage of the whole model, micro-batch
    clocks, places = [0.0] * stages, [0] * stages
    while any(place < 2 * total for place in places):
        moved = False
        for stage, order in enumerate(orders):
            while places[stage] < 2 * total:
                kind, chunk, micro = order[places[stage]]
                depth = chunk * stages + stage
                if kind == "forward":
                    needs = [("forward", depth - 1, micro)] if depth else []
                else:
                    behind_it = ("backward", depth + 1, micro)
                    needs = [behind_it if depth < last else ("forward", depth, micro)]
                if any(need not in done for need in needs):
                    break
                begins = max([clocks[stage], *(done[need] for need in needs)])
                clocks[stage] = begins + (1 if kind == "forward" else 2) / chunks
                done[kind, depth, micro] = clocks[stage]
                places[stage] += 1
                moved = True
        assert moved, "the schedule waits for itself"
    return max(clocks)


@pytest.mark.parametrize(("stages", "chunks"), [(2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_the_bubble_is_that_of_the_schedule_played_through(
    stages: int, chunks: int, rounds: int
) -> None:
    number = rounds * stages
    layout = ParallelLayout(stages, pipeline_size=stages, virtual_size=chunks)
    work = Work(tokens=4096 * number, samples=number, pack_tokens=4096)
    assert micro_batches(work, layout) == number
    time = time_of(layout, work, machine=INSTANT)
    assert time.bubble_s / time.compute_s == pytest.approx(
        played_through(stages, chunks, number) / (3 * number) - 1
    )


def test_a_step_of_a_layer_is_the_sum_done_by_hand() -> None:
    layout = ParallelLayout(64, tensor_size=4, context_size=2, pipeline_size=2)  # data 4
    work = Work(tokens=8 * 4 * 8192, samples=64, pack_tokens=8192)
    machine = Machine(collective_s=0.0)
    time = time_of(layout, work, machine=machine)
    assert micro_batches(work, layout) == 8
    passes = 8 * 16  # micro-batches through the layers of a stage
    hidden = 4096 * 4096 * 2  # bytes of a context rank's tokens
    assert time.tensor_s == pytest.approx(passes * 8 * hidden * 3 / 4 / machine.node_bytes_per_s)
    keys = 2 * 8192 * 1024 * 2 / 4  # keys and values of the pack, of a tensor rank
    assert time.context_s == pytest.approx(passes * 2 * keys / 2 / machine.node_bytes_per_s)
    assert time.pipeline_s == pytest.approx(2 * 8 * hidden / 4 / machine.network_bytes_per_s)
    replicas, parameters = 4 * 2, SHAPE.num_parameters / 8
    exchanged = parameters * (4 + 2) * (replicas - 1) / replicas
    assert time.data_s == pytest.approx(exchanged / machine.network_bytes_per_s)
    flops = 6 * SHAPE.num_matmul_parameters + 6 * 32 * 4096 * 4096  # of a token of such a sample
    assert time.compute_s == pytest.approx(work.tokens * flops / 64 / machine.flops_per_s)
    assert time.recompute_s == 0
    again = time_of(layout, work, recompute="full", machine=machine)
    of_head = 6 * work.tokens * 128_256 * 4096 / 64 / machine.flops_per_s
    assert again.recompute_s == pytest.approx((time.compute_s - of_head) / 3)
    assert again.tensor_s == pytest.approx(1.5 * time.tensor_s)
    assert again.context_s == pytest.approx(1.5 * time.context_s)
    mlp = time_of(layout, work, recompute=["mlp"], machine=machine)
    of_mlps = 2 * work.tokens * 32 * 3 * 14336 * 4096 / 64 / machine.flops_per_s
    assert mlp.recompute_s == pytest.approx(of_mlps)
    assert (mlp.tensor_s, mlp.context_s) == (pytest.approx(1.25 * time.tensor_s), time.context_s)
    core = time_of(layout, work, recompute="selective", machine=machine)
    assert core == time_of(layout, work, recompute=["core_attn", "layernorm"], machine=machine)
    scores = 2 * work.tokens * 32 * 4096 * 4096 / 64 / machine.flops_per_s
    assert core.recompute_s == pytest.approx(scores)
    assert (core.tensor_s, core.context_s) == (time.tensor_s, pytest.approx(1.5 * time.context_s))


def test_ranks_that_lie_further_apart_than_a_node_exchange_over_the_network() -> None:
    work = Work(tokens=8192, samples=8, pack_tokens=8192)
    machine = Machine(collective_s=0.0)
    for tensor, rate in ((2, machine.node_bytes_per_s), (4, machine.network_bytes_per_s)):
        layout = ParallelLayout(4 * tensor, tensor_size=tensor, context_size=4)
        gathered = 2 * 8192 * 1024 * 2 / tensor * 3 / 4
        time = time_of(layout, work, machine=machine)
        assert time.context_s == pytest.approx(32 * 2 * gathered / rate)


def test_data_ranks_without_a_sample_do_no_work() -> None:
    work = Work(tokens=2 * 4096, samples=2, pack_tokens=4096)
    two, eight = (time_of(ParallelLayout(number), work) for number in (2, 8))
    assert two.compute_s == eight.compute_s


def test_interleaved_stages_take_turns_so_micro_batches_divide_by_them() -> None:
    work = Work(tokens=3 * 4096, samples=3, pack_tokens=4096)
    layout = ParallelLayout(2, pipeline_size=2)
    assert micro_batches(work, layout) == 3
    assert micro_batches(work, replace(layout, virtual_size=2)) == 4


def layouts() -> st.SearchStrategy[ParallelLayout]:
    degree = st.sampled_from([1, 2, 4, 8])

    def of(tensor: int, stages: int, context: int, data: int) -> ParallelLayout:
        return ParallelLayout(
            tensor * stages * context * data,
            tensor_size=tensor,
            pipeline_size=stages,
            context_size=context,
            sequence_parallel=tensor > 1,
        )

    return st.builds(of, degree, degree, degree, degree)


WORK = st.builds(
    lambda samples, mean, pack: Work(tokens=samples * mean, samples=samples, pack_tokens=pack),
    st.integers(1, 512),
    st.integers(1, 4096),
    st.sampled_from([4096, 8192, 32768]),
)


@given(layout=layouts(), work=WORK, recompute=st.sampled_from(RECOMPUTE))
@settings(deadline=None, max_examples=200)
def test_an_axis_of_one_costs_nothing_and_every_part_has_its_cause(
    layout: ParallelLayout, work: Work, recompute: Collection[str]
) -> None:
    time = time_of(layout, work, recompute=recompute)
    assert all(part >= 0 for part in astuple(time))
    assert (time.tensor_s > 0) == (layout.tensor_size > 1)
    assert (time.context_s > 0) == (layout.context_size > 1)
    assert (time.pipeline_s > 0) == (time.bubble_s > 0) == (layout.pipeline_size > 1)
    assert (time.data_s > 0) == (layout.data_size * layout.context_size > 1)
    assert (time.recompute_s > 0) == (recompute != "none")
    assert time.total_s == pytest.approx(sum(astuple(time)))


@given(layout=layouts(), work=WORK, recompute=st.sampled_from(RECOMPUTE))
@settings(deadline=None, max_examples=200)
def test_a_quicker_machine_or_less_to_do_is_never_slower(
    layout: ParallelLayout, work: Work, recompute: Collection[str]
) -> None:
    time = time_of(layout, work, recompute=recompute)
    for name in ("flops_per_s", "node_bytes_per_s", "network_bytes_per_s"):
        quicker = replace(Machine(), **{name: 2 * getattr(Machine(), name)})
        assert time_of(layout, work, recompute=recompute, machine=quicker).total_s <= time.total_s
    assert (
        time_of(layout, work).total_s
        <= time.total_s
        <= time_of(layout, work, recompute="full").total_s
    )
    more = replace(work, tokens=2 * work.tokens, samples=2 * work.samples)
    assert time_of(layout, more, recompute=recompute).compute_s >= time.compute_s
    # No layout computes quicker than all GPUs together.
    alone = time_of(ParallelLayout(1), work).compute_s
    assert time.compute_s >= alone / layout.world_size * (1 - 1e-9)


@given(layout=layouts(), work=WORK)
@settings(deadline=None, max_examples=100)
def test_the_bubble_shrinks_with_virtual_stages_and_with_micro_batches(
    layout: ParallelLayout, work: Work
) -> None:
    time = time_of(layout, work, machine=INSTANT)
    if layout.pipeline_size * 2 <= SHAPE.num_layers:
        more = replace(layout, virtual_size=2 if layout.pipeline_size > 1 else 1)
        assert time_of(more, work, machine=INSTANT).bubble_s <= time.bubble_s * (1 + 1e-9)
    shorter = replace(work, pack_tokens=work.pack_tokens // 2)
    assert time_of(layout, shorter, machine=INSTANT).bubble_s <= time.bubble_s * (1 + 1e-9)
