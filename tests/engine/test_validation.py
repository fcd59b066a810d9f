"""Validation losses by turn and tool call, and token accuracy, against transformers' logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from roll_sft.base.metrics import EvalMetrics
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.engine.validation import NUM_TURNS, answer_parts
from roll_sft.job.in_process import prepare_job
from roll_sft.parity.oracle import token_losses
from tests import parity
from tests.engine.test_parity import LAYOUTS
from tests.pool import RankPool

CALL = "<tool_call>"


def spans(mask: str, tokens: str = "", call: str = "!") -> list[tuple[int, bool]]:
    """`answer_parts` of a mask like "0110" and letters as tokens."""
    ids = np.array([ord(each) for each in tokens or "a" * len(mask)], np.int32)
    turns, is_call = answer_parts(ids, np.array([*map(int, mask)], np.uint8), [ord(call)])
    return [*zip(turns.tolist(), is_call.tolist(), strict=True)]


def test_a_turn_is_a_run_of_labels_and_a_call_reaches_to_its_end() -> None:
    assert [turn for turn, _ in spans("0110100110")] == [0, 1, 1, 0, 2, 0, 0, 3, 3, 0]
    assert [turn for turn, _ in spans("110")] == [1, 1, 0]
    assert not any(turn for turn, _ in spans("000"))
    # The label at t is the token at t + 1: "!" at 3 is that of 2. One in a prompt opens nothing.
    tokens, mask = "!ab!cd!ef!g", "01111011010"
    assert [call for _, call in spans(mask, tokens)] == [
        *(False, False, True, True, True, False, False, False, False, False, False),
    ]
    assert [call for _, call in spans("011011110", "abcabc!cd")][4:] == [
        False,
        True,
        True,
        True,
        False,
    ]


def write_conversations(path: Path) -> None:
    generator = np.random.default_rng(3)
    words = ["the", "sum", "of", "two", "numbers", "is", "given", "in", "this", "list"]

    def text(most: int) -> str:
        return " ".join(generator.choice(words, size=generator.integers(1, most)))

    lines = []
    for row in range(20):
        messages = []
        for turn in range(1 + row % 4 if row else NUM_TURNS + 2):
            call = f"{CALL}{text(6)}" if (row + turn) % 3 == 0 else ""
            messages += [
                {"role": "user", "content": text(8)},
                {"role": "assistant", "content": f"{text(9)} {call}"},
            ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has one token for the beginning of a call, and conversations."""
    root = tmp_path_factory.mktemp("validation")
    parity.write_model(root / "model", kind="qwen2-tied", num_layers=4)
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    tokenizer.add_tokens([CALL])
    tokenizer.save_pretrained(root / "model")
    write_conversations(root / "rows.jsonl")
    return root


def config_of(folder: Path, parallel: dict[str, Any], **sections: Any) -> RunConfig:
    held_out = {"path": str(folder / "rows.jsonl"), "name": "held_out"}
    data = {"validation": [held_out], "sequence_length": 500}
    train = {"global_batch_size": 7, "micro_batch_tokens": 700, **sections.pop("train", {})}
    return parity.parity_config(folder, parallel=parallel, data=data, train=train, **sections)


def evaluated(config: RunConfig) -> EvalMetrics | None:
    import torch.distributed as dist

    from roll_sft.engine.engine import Engine

    job = prepare_job(config)
    engine = Engine(config, source=job.source, data=job.data)
    data_rank = job.layout.coordinate(dist.get_rank()).data_rank
    chunks = [
        engine.evaluate("held_out", plan.ranks[data_rank])
        for plan in job.validation["held_out"].evaluation()
    ]
    if chunks[0] is None:
        return None
    return sum(filter(None, chunks), EvalMetrics(0.0, 0))


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, tuple[float, int, int]]:
    """Part -> loss sum, tokens and hits, from transformers' logits and the texts of the tokens."""
    job = prepare_job(config_of(folder, {"num_workers": 1}))
    (call_id,) = job.data.tool_call_ids
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    model = model.double()
    sums: dict[str, list[float]] = {}
    tokens = job.data.validation["held_out"]
    for index in range(len(tokens)):
        ids, mask = tokens.sample(index)
        with torch.no_grad():
            logits = model(torch.tensor(ids[None].astype(np.int64))).logits[0]
        losses = token_losses(model, ids, mask)
        hits = logits.argmax(-1)
        turn, in_call, was_label, at = 0, False, False, 0
        for place in range(len(ids) - 1):
            if not mask[place]:
                was_label = False
                continue
            if not was_label:
                turn, in_call, was_label = turn + 1, False, True
            in_call = in_call or int(ids[place + 1]) == call_id
            name = f"turn_{turn}" if turn < NUM_TURNS else f"turn_{NUM_TURNS}_on"
            for part in ["all", name, *["tool_calls"] * in_call]:
                of_part = sums.setdefault(part, [0.0, 0, 0])
                of_part[0] += losses[at].item()
                of_part[1] += 1
                of_part[2] += int(hits[place] == int(ids[place + 1]))
            at += 1
        assert at == len(losses)
    return {name: (loss, round(count), round(hit)) for name, (loss, count, hit) in sums.items()}


CASES = {
    **{name: (layout, {}) for name, layout in LAYOUTS.items()},
    "smoothed": (LAYOUTS["DP2"], {"train": {"label_smoothing": 0.1, "loss": "sample_mean"}}),
    "compiled": (LAYOUTS["1"], {"model": {"compile": True}}),
}
QUICK = ("TP2+SP", "CP2", "PP2x2", "DP2", "smoothed")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_part_equals_transformers_at_every_layout(
    case: str,
    folder: Path,
    pool: RankPool,
    expected: dict[str, tuple[float, int, int]],
    request: pytest.FixtureRequest,
) -> None:
    if case not in QUICK and not request.config.getoption("--all-layouts"):
        pytest.skip("make parity runs every layout")
    layout, sections = CASES[case]
    config = config_of(folder, layout, **sections)
    (found,) = filter(None, pool.run(evaluated, layout_of(config.parallel), config))
    parts = {"all": found, **found.parts}
    assert set(parts) == set(expected)
    assert {"turn_1", f"turn_{NUM_TURNS}_on", "tool_calls"} < set(parts)
    for name, (loss, count, hits) in expected.items():
        assert parts[name].supervised_tokens == count, name
        assert parts[name].correct_tokens == hits, name
        assert parts[name].loss_sum == pytest.approx(loss, rel=2e-6), name
    turns = [part for name, part in found.parts.items() if name.startswith("turn")]
    assert sum(part.loss_sum for part in turns) == pytest.approx(found.loss_sum, rel=1e-6)
