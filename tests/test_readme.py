"""What the README and CONTRIBUTING tell people to type exists and is accepted."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config

from roll_sft import cli, run
from roll_sft.config.schema import on_device
from roll_sft.job.memory import estimate
from roll_sft.models.source import family_of
from tests import doors
from tests.doors import Door
from tests.fences import commands

door = doors.door
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
GPU_PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


QWEN_7B = Qwen2Config(
    vocab_size=152_064,
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
    architectures=["Qwen2ForCausalLM"],
)


@pytest.mark.parametrize("words", commands(ROOT / "README.md"), ids=" ".join)
def test_a_command_of_the_readme_is_accepted(door: Door, words: list[str]) -> None:
    name, *arguments = words
    assert name in cli.COMMANDS
    if name in ("train", "plan", "preview", "parity"):
        assert cli.main([name, *arguments, "--cfg", "job"]) == 0


@pytest.mark.parametrize(
    ("text", "folder"),
    [(README, ROOT), (CONTRIBUTING, ROOT), (GPU_PAGE, ROOT / "docs")],
    ids=["README", "CONTRIBUTING", "gpu"],
)
def test_every_verb_and_every_linked_file_exists(text: str, folder: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    verbs = set(re.findall(r"^([a-z-]+):", makefile, flags=re.M))
    named = set(re.findall(r"(?:^|`)(?:\w+=\S+ )*make ([a-z-]+)", text, flags=re.M))
    assert named
    assert named <= verbs
    links = re.findall(r"\]\(([^)#:]+)(?:#([^)]*))?\)", text)
    for name, anchor in links:
        path = folder / name
        assert path.exists(), name
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.M)
            slugs = {
                re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles
            }
            assert anchor in slugs, anchor


# What a setting of the page's table is in a configuration.
SETTINGS: dict[str, dict[str, Any]] = {
    "`train.recompute=[core_attn,layernorm]`": {"train.recompute": ["core_attn", "layernorm"]},
    "`train.recompute=[core_attn,mlp,layernorm]`": {
        "train.recompute": ["core_attn", "mlp", "layernorm"]
    },
    "`train.recompute=full`": {"train.recompute": "full"},
    "`model.compile=false`": {"model.compile": False},
    "`model.dtype=fp32`": {"model.dtype": "fp32"},
    "`parallel.sequence_parallel=false`": {"parallel.sequence_parallel": False},
    "`parallel.pipeline_model_parallel_size=2`": {"parallel.pipeline_model_parallel_size": 2},
    "with `virtual_pipeline_model_parallel_size=2`": {
        "parallel.pipeline_model_parallel_size": 2,
        "parallel.virtual_pipeline_model_parallel_size": 2,
    },
    "`parallel.context_parallel_size=2`": {"parallel.context_parallel_size": 2},
    "`parallel.use_distributed_optimizer=false`": {"parallel.use_distributed_optimizer": False},
}


def test_the_memory_of_each_setting_is_what_a_plan_estimates() -> None:
    shape = family_of(QWEN_7B).shape(QWEN_7B)

    composed = run.compose(["--config-name=qwen7b_sft", "data.train=[{path: my.jsonl}]"])
    assert composed is not None

    def gib(given: dict[str, Any]) -> float:
        config = on_device(composed[0], "cuda")
        for name, value in given.items():
            section, _, key = name.partition(".")
            config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
        return estimate(config, shape).total_gib

    before = gib({})
    cells = dict(re.findall(r"^\| ([^|]*) \| (\d+ GiB (?:more|less)) ", GPU_PAGE, flags=re.M))
    assert set(cells) == set(SETTINGS)
    for setting, given in SETTINGS.items():
        size, _, way = cells[setting].split()
        wanted = int(size) if way == "more" else -int(size)
        assert gib(given) - before == pytest.approx(wanted, abs=1), setting


def test_the_figures_of_the_readme_are_those_of_the_pages() -> None:
    measured = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    figures = re.findall(r"\| ([\d.]+) \| \[measure (\d+)\]", README)
    assert len(figures) == 3
    for figure, number in figures:
        (of_page, *_) = re.findall(rf"^\| {number} \| .*? \| ([\d.]+) \|", measured, flags=re.M)
        assert float(figure) == pytest.approx(float(of_page), rel=0.02)
    (utilisation,) = re.findall(r"\| ([\d.]+) \| \[run on hardware\]", README)
    assert f"| 7B with 20 of 28 layers, packs of 8,192 | 17,735 | {utilisation} |" in GPU_PAGE
