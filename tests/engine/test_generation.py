"""Answers of the engine beside transformers' `generate` on the same weights, at every layout."""

import importlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from roll_sft.base.generation import Generated, GenerationRequest
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.job.in_process import prepare_job
from tests import parity
from tests.engine.test_parity import LAYOUTS
from tests.families import FAMILIES
from tests.pool import RankPool

pytestmark = pytest.mark.slow

PROMPTS, NEW_TOKENS = 16, 64
STOPS = (5, 17, 301)
MORE_LAYOUTS: dict[str, dict[str, Any]] = {
    **{name: dict(values) for name, values in LAYOUTS.items()},
    "TP2xPP2": {
        "num_workers": 4,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
    },
    "EP2": {"num_workers": 2, "expert_model_parallel_size": 2},
    "EP2xPP2": {
        "num_workers": 4,
        "expert_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
    },
}


@dataclass(frozen=True)
class Case:
    kind: str
    layout: str
    lora: bool = field(default=False, kw_only=True)

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.layout}" + "-lora" * self.lora


def request(*, new_tokens: int = NEW_TOKENS, **options: Any) -> GenerationRequest:
    """Prompts of 1 to 90 tokens."""
    generator = np.random.default_rng(3)
    lengths = [1, 90, *generator.integers(2, 60, size=PROMPTS - 2).tolist()]
    prompts = tuple(tuple(generator.integers(0, 400, size=n).tolist()) for n in lengths)
    return GenerationRequest(prompts, STOPS, new_tokens, **options)


def engine_answers(
    config: RunConfig, requests: list[GenerationRequest]
) -> list[list[Generated] | None]:
    """What this rank's engine answers to each request. In a pool."""
    from roll_sft.engine.engine import Engine
    from roll_sft.engine.generation.generate import generate

    job = prepare_job(config)
    engine = Engine(config, source=job.source, data=job.data)
    return [generate(engine, each) for each in requests]


def answers_of(
    config: RunConfig, pool: RankPool, *requests: GenerationRequest
) -> list[list[Generated]]:
    """The answers to each request, in the order of its prompts."""
    ranks = pool.run(engine_answers, layout_of(config.parallel), config, list(requests))
    found = []
    for number, asked in enumerate(requests):
        answers = [each for rank in ranks for each in rank[number] or ()]
        assert sorted(each.index for each in answers) == [*range(len(asked.prompts))]
        found.append(sorted(answers, key=lambda each: each.index))
    return found


@cache
def expected(
    model: Path, asked: GenerationRequest, adapter: Path | None = None
) -> list[tuple[int, ...]]:
    """What transformers generates greedily, each answer with the token that stopped it.

    With `adapter` it is peft's model.
    """
    oracle = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    if adapter is not None:
        from peft import PeftModel

        oracle = PeftModel.from_pretrained(oracle, adapter).eval()
    longest = max(map(len, asked.prompts))
    ids = torch.zeros(len(asked.prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(asked.prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    output = oracle.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=asked.max_new_tokens,
        eos_token_id=list(asked.stop_ids),
        pad_token_id=0,
    )
    answers = []
    for tokens in output[:, longest:].tolist():
        stop = next((i for i, each in enumerate(tokens) if each in asked.stop_ids), len(tokens) - 1)
        answers.append(tuple(tokens[: stop + 1]))
    return answers


ALL = [
    *(Case("qwen2-tied", layout) for layout in (*LAYOUTS, "TP2xPP2")),
    *(Case("qwen3moe", layout) for layout in ("1", "EP2", "EP2xPP2")),
    *(Case(kind, "1") for kind in FAMILIES),
    Case("gemma2", "TP2+SP"),
    Case("olmo3", "PP2"),
    Case("deepseekv3", "TP2+SP"),
    Case("qwen2-one_kv_head", "TP2"),
    *(Case("qwen2-tied", layout, lora=True) for layout in ("1", "TP2", "PP2", "TP2+SP")),
]
SUBSET = [
    Case("qwen2-tied", "TP2xPP2"),
    Case("gemma2", "TP2+SP"),
    Case("qwen3moe", "EP2"),
    Case("qwen2-tied", "TP2+SP", lora=True),
]
DRAWN = [
    *(("qwen2-tied", layout) for layout in ("TP2", "TP2+SP", "PP2", "DP2", "CP2", "TP2xPP2")),
    ("qwen3moe", "EP2"),
]
DRAWN_SUBSET = [("qwen2-tied", "DP2")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    is_full = metafunc.config.getoption("--all-layouts")
    if "case" in metafunc.fixturenames:
        cases = ALL if is_full else SUBSET
        metafunc.parametrize("case", cases, ids=lambda case: case.name)
    if "drawn_case" in metafunc.fixturenames:
        drawn = DRAWN if is_full else DRAWN_SUBSET
        metafunc.parametrize("drawn_case", drawn, ids="-".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generation")
    parity.write_rows(root / "rows.jsonl")
    return root


@cache
def adapter_of(home: Path) -> Path:
    """An adapter of the model in `home` that changes its answers."""
    lora = importlib.import_module("tests.lora")
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    adapter: Path = lora.write_adapter(home / "model", home / "adapter", **options)
    return adapter


def test_greedy_answers_equal_those_of_transformers(
    case: Case, folder: Path, pool: RankPool
) -> None:
    home, asked, adapter = parity.home_of(folder, case.kind), request(), None
    layout = dict(MORE_LAYOUTS[case.layout])
    config = parity.parity_config(home, parallel=layout)
    if case.lora:
        lora = importlib.import_module("tests.lora")
        adapter = adapter_of(home)
        config = lora.lora_config(home, adapter, parallel=layout)
    (answers,) = answers_of(config, pool, asked)
    wanted = expected(home / "model", asked, adapter)
    assert [each.ids for each in answers] == wanted
    assert [each.is_stopped for each in answers] == [ids[-1] in STOPS for ids in wanted]
    assert not any(each.is_late for each in answers)
    assert not case.lora or wanted != expected(home / "model", asked)


@cache
def drawn_alone(home: Path, pool: RankPool) -> list[list[Generated]]:
    """The answers of one process by two seeds."""
    config = parity.parity_config(home)
    return answers_of(config, pool, *(drawn_request(seed) for seed in (3, 4)))


def drawn_request(seed: int) -> GenerationRequest:
    return request(new_tokens=24, temperature=0.8, top_p=0.9, top_k=40, seed=seed)


def test_drawn_answers_are_equal_at_every_layout(
    drawn_case: tuple[str, str], folder: Path, pool: RankPool
) -> None:
    kind, layout = drawn_case
    home = parity.home_of(folder, kind)
    config = parity.parity_config(home, parallel=dict(MORE_LAYOUTS[layout]))
    wanted, other = drawn_alone(home, pool)
    (answers,) = answers_of(config, pool, drawn_request(3))
    assert answers == wanted != other


@pytest.mark.parametrize("layout", ["1", "PP2xDP2"])
def test_a_deadline_cuts_answers_to_what_there_is(
    layout: str, folder: Path, pool: RankPool, request: pytest.FixtureRequest
) -> None:
    if layout != "1" and not request.config.getoption("--all-layouts"):
        pytest.skip("make parity runs every layout")
    home = parity.home_of(folder, "qwen2-tied")
    config = parity.parity_config(home, parallel=dict(MORE_LAYOUTS[layout]))
    generator = np.random.default_rng(4)
    prompts = tuple(tuple(generator.integers(0, 400, size=5).tolist()) for _ in range(200))
    (answers,) = answers_of(config, pool, GenerationRequest(prompts, (), 8, deadline_s=1e-9))
    # The first batch of each replica has its first token; the others were not begun.
    assert {len(each.ids) for each in answers} == {0, 1}
    assert all(each.is_late for each in answers)
    assert not any(each.is_stopped for each in answers)
