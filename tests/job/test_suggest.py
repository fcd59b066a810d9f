"""`roll-sft plan --suggest`: the layouts it proposes, and what it says where none fits."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_sft import cli
from roll_sft.config.build import build_config
from roll_sft.config.layout_checks import layout_problems
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.job.layouts import TIE, Gpus, candidates, fits, splits, variants
from roll_sft.job.model import model_problems
from roll_sft.job.step_time import Work
from tests import doors
from tests.doors import Door, cells, refused, write_rows
from tests.job.test_presets import LLAMA_70B, QWEN_7B
from tests.job.test_step_time import SHAPE
from tests.outcome import Outcome

door = doors.door


def config_of(*, length: int = 4096, pack: int = 8192) -> RunConfig:
    return build_config(
        {
            "model": {"dtype": "bf16"},
            "parallel": {"device": "cuda"},
            "data": {"sequence_length": length},
            "train": {"micro_batch_tokens": pack},
        }
    )


GPUS = st.builds(
    Gpus,
    st.sampled_from([1, 2, 4, 6, 8, 16, 24, 64]),
    st.floats(20, 300),
    st.just(8),
)
WORK = st.builds(
    lambda samples, mean: Work(tokens=samples * mean, samples=samples, pack_tokens=8192),
    st.integers(1, 512),
    st.integers(16, 4096),
)


@given(gpus=GPUS, work=WORK, layers=st.integers(1, 80), length=st.sampled_from([2048, 4096, 32768]))
@settings(deadline=None, max_examples=40)
def test_candidates_can_run_are_complete_and_begin_with_the_quickest(
    gpus: Gpus, work: Work, layers: int, length: int
) -> None:
    shape, config = replace(SHAPE, num_layers=layers), config_of(length=length, pack=32768)
    found = candidates(config, shape, work, gpus)
    names = [each.degrees for each in found]
    assert len(set(names)) == len(names)
    for each in found:
        assert each.layout.world_size == gpus.number
        assert each.layout.tensor_size <= gpus.per_node
        assert [*layout_problems(each.config.parallel), *model_problems(each.config, shape)] == []
    # Each way to split the GPUs is there, or the model refuses it.
    for parallel in splits(config, shape, gpus):
        layout, asked = layout_of(parallel), replace(config, parallel=parallel)
        name = (
            f"TP{layout.tensor_size} PP{layout.pipeline_size} CP{layout.context_size}"
            f" DP{layout.data_size}"
        )
        assert name in names or any(model_problems(asked, shape))
    # What fits comes first, and nothing that fits is quicker than the first by more than a tie.
    fitting = [fits(each, gpus) for each in found]
    assert fitting == sorted(fitting, reverse=True)
    everything = list(variants(config, shape, work, gpus))
    times = [each.time.total_s for each in everything if fits(each, gpus)]
    assert bool(times) == any(fitting)
    if times:
        first = found[0]
        assert first.time.total_s <= TIE * min(times)
        simpler = [
            each for each in everything if fits(each, gpus) and len(each.axes) < len(first.axes)
        ]
        assert all(each.time.total_s > TIE * min(times) for each in simpler)
    else:
        assert found[0].memory.total_gib == min(each.memory.total_gib for each in everything)


@given(gpus=GPUS, work=WORK)
@settings(deadline=None, max_examples=20)
def test_larger_gpus_are_never_slower(gpus: Gpus, work: Work) -> None:
    larger = replace(gpus, memory_gib=1.5 * gpus.memory_gib)
    before, after = (candidates(config_of(), SHAPE, work, each)[0] for each in (gpus, larger))
    if fits(before, gpus):
        assert fits(after, larger)
        assert after.time.total_s <= TIE * before.time.total_s


@pytest.fixture
def plan(door: Door, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Door:
    """`roll-sft plan` of a 7B model, or a 70B one in the folder `large`."""
    for name, model in (("model", QWEN_7B), ("large", LLAMA_70B)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(model))
    row = {"instruction": "Say it.", "output": "It is said. " * 130}  # some 400 tokens
    write_rows(tmp_path / "rows.jsonl", [row] * 256)

    def call(*given: str) -> Outcome:
        capsys.readouterr()
        data = ("model.path=model", "data.train=[{path: rows.jsonl}]")
        return Outcome(cli.main(["plan", *data, *given]), *capsys.readouterr())

    return call


def suggested(outcome: Outcome) -> list[list[str]]:
    """The overrides of each suggestion, none of them the configuration's own."""
    assert outcome.code == 0, outcome.stderr
    found = re.findall(r"^[123]: (.*)$", outcome.stdout, flags=re.M)
    return [shlex.split(line) for line in found]


def test_three_layouts_are_proposed_and_each_other_one_has_its_reason(plan: Door) -> None:
    outcome = plan("--suggest", "--gpus", "8", "--memory", "80", "train.micro_batch_tokens=8192")
    found = suggested(outcome)
    assert len(found) == 3
    assert cells(outcome.stdout, "1")[1] == "TP2 PP1 CP1 DP4"
    reasons = outcome.stdout.partition("What the others lose by")[2]
    lines = dict(re.findall(r"^ (TP\d+ PP\d+ CP\d+ DP\d+): (.*)$", reasons, flags=re.M))
    proposed = {cells(outcome.stdout, number)[1] for number in "123"}
    # The splits of eight GPUs over tensor, pipeline and data ranks, but tensor 8 with 28 heads.
    assert len({*lines, *proposed}) == len(lines) + len(proposed) == 9
    assert "recomputation" in lines["TP1 PP1 CP1 DP8"]
    assert "bubble" in lines["TP1 PP8 CP1 DP1"]
    assert "8 does not divide the model's num_attention_heads 28" in reasons
    assert "data.sequence_length is 4,096" in reasons
    # What is to be pasted is what was estimated.
    pasted = plan("train.micro_batch_tokens=8192", *found[0])
    assert pasted.code == 0, pasted.stderr
    assert cells(pasted.stdout, "in all (estimate)")[1].split()[0] == cells(outcome.stdout, "1")[5]


def test_the_layout_of_the_configuration_does_not_matter(plan: Door) -> None:
    given = ("--suggest", "--gpus=8", "--memory=80")
    outcome = plan(*given)
    table = outcome.stdout.partition("\n1: ")[0]
    other = ("parallel.num_workers=3", "parallel.tensor_model_parallel_size=7")
    assert plan(*given, *other).stdout.startswith(table)
    pasted = plan(*given, *suggested(outcome)[0])
    assert pasted.stdout.startswith(table)
    assert "\n1: as it is configured\n" in pasted.stdout


def test_a_part_of_a_node_has_layouts_too(plan: Door) -> None:
    for overrides in suggested(plan("--suggest", "--gpus=4", "--memory=141")):
        assert "parallel.num_workers=4" in overrides


def test_where_nothing_fits_the_last_line_names_what_would(plan: Door) -> None:
    given = ("--suggest", "model.path=large")  # whose state alone is 74 GiB on 16 GPUs
    outcome = plan(*given, "--gpus=16", "--memory=78")
    refused(outcome, 2, "--memory: 78", "16 GPUs", "TP8 PP2 CP1 DP1", "train.recompute=full")
    (gpus,) = re.findall(r"--gpus (\d+)", outcome.last_line)
    (memory,) = re.findall(r"--memory (\d+)", outcome.last_line)
    assert suggested(plan(*given, f"--gpus={gpus}", "--memory=78"))
    assert suggested(plan(*given, "--gpus=16", f"--memory={memory}"))


def test_where_packs_are_too_long_the_last_line_names_a_length_that_fits(plan: Door) -> None:
    given = ("--suggest", "--gpus=2", "--memory=72")  # 3 GiB beside the state
    outcome = plan(*given, "data.sequence_length=32768")
    refused(outcome, 2, "--memory: 72")
    (shorter,) = re.findall(
        r"(data\.sequence_length=\d+) (train\.micro_batch_tokens=\d+)", outcome.last_line
    )
    assert suggested(plan(*given, *shorter))


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["--suggest", "--gpus", "8"], ["--suggest", "--memory"]),
        (["--suggest", "--memory", "80"], ["--suggest", "--gpus"]),
        (["--gpus", "8"], ["--gpus", "--suggest"]),
        (["--suggest", "--gpus", "0", "--memory", "80"], ["--gpus", "'0'"]),
        (["--suggest", "--gpus", "8", "--memory", "lots"], ["--memory", "'lots'"]),
        (["--suggest", "--gpus", "12", "--memory", "80"], ["--gpus: 12", "multiple of 8"]),
        (["--suggest", "--gpus", "99999", "--memory", "80"], ["--gpus: 99999", "65536"]),
        (
            ["--suggest", "--gpus", "8", "--memory", "80", "parallel.device=cpu"],
            ["parallel.device: cpu", "--suggest"],
        ),
        (["--suggest", "--gpus", "8", "--memory", "80", "typo=1"], ["typo"]),
    ],
)
def test_a_mistake_is_code_2(plan: Door, given: list[str], parts: list[str]) -> None:
    refused(plan(*given), 2, *parts)
