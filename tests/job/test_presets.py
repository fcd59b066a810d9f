"""Every shipped configuration of a GPU machine, dry-run on the public shape of its model."""

import json
from pathlib import Path
from typing import Any

import pytest

from roll_sft.run import shipped_configurations
from tests import doors
from tests.doors import Door, cells, write_rows

door = doors.door


def qwen(hidden: int, ffn: int, layers: int, heads: int, groups: int) -> dict[str, Any]:
    """The config.json of a Qwen2.5 model: its published numbers."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": layers <= 36 and hidden <= 2048,  # up to 3B
        "vocab_size": 151936 if hidden <= 2048 else 152064,
    }


LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN_7B = qwen(3584, 18944, 28, 28, 4)
# Of a GPU, after 5 GiB for CUDA's context, NCCL's buffers and fragments.
OF_80_GB, OF_141_GB = 75.0, 134.0
# Configuration -> config.json, parameters as the plan counts them, GiB that each GPU has.
PRESETS = {
    "qwen0_5b_sft": (qwen(896, 4864, 24, 14, 2), "494,032,768", 35.0),  # a GPU of 40 GB
    "qwen1_5b_sft": (qwen(1536, 8960, 28, 12, 2), "1,543,714,304", OF_80_GB),
    "qwen3b_sft": (qwen(2048, 11008, 36, 16, 2), "3,085,938,688", OF_80_GB),
    "qwen7b_sft": (QWEN_7B, "7,615,616,512", OF_80_GB),
    "qwen7b_long_sft": (QWEN_7B, "7,615,616,512", OF_80_GB),
    "qwen14b_sft": (qwen(5120, 13824, 48, 40, 8), "14,770,033,664", OF_80_GB),
    "qwen32b_sft": (qwen(5120, 27648, 64, 40, 8), "32,763,876,352", OF_80_GB),
    "llama70b_2_nodes_sft": (LLAMA_70B, "70,553,706,496", OF_141_GB),
    "llama70b_sft": (LLAMA_70B, "70,553,706,496", OF_80_GB),
    "llama70b_8_nodes_sft": (LLAMA_70B, "70,553,706,496", OF_80_GB),
}


def plan_of(door: Door, folder: Path, name: str, *given: str) -> str:
    """The dry run of configuration `name`."""
    (folder / "config.json").write_text(json.dumps(PRESETS[name][0]))
    rows = write_rows(folder / "rows.jsonl", [{"instruction": "Add 2 and 3.", "output": "5"}])
    data = (f"model.path={folder}", f"data.train=[{{path: {rows}}}]")
    outcome = door("--config-name", name, *data, "dry_run=true", *given)
    assert outcome.code == 0, outcome.stderr
    return outcome.stdout


def memory_gib(plan: str) -> float:
    size, unit = cells(plan, "in all (estimate)")[1].split()[:2]
    assert unit == "GiB"
    return float(size)


def test_every_configuration_but_the_small_ones_is_here() -> None:
    shipped = {path.stem for path in shipped_configurations().glob("*.yaml")}
    assert shipped == {*PRESETS, "base", "demo"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_its_gpus(name: str, door: Door, tmp_path: Path) -> None:
    _, parameters, room_gib = PRESETS[name]
    plan = plan_of(door, tmp_path, name)
    assert parameters in plan
    # An estimate far below the room would be a layout that splits more than it must.
    assert 0.55 * room_gib < memory_gib(plan) < room_gib, plan


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("qwen3b_sft", ["train.micro_batch_tokens=8192", "train.recompute=full"]),
        ("qwen32b_sft", ["parallel=gpus_16_tp8", "train.recompute=none"]),
    ],
)
def test_what_a_comment_offers_fits(
    name: str, given: list[str], door: Door, tmp_path: Path
) -> None:
    assert memory_gib(plan_of(door, tmp_path, name, *given)) < PRESETS[name][2]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("qwen3b_sft", ["train.micro_batch_tokens=8192"]),
        ("qwen14b_sft", ["parallel=gpus_8_tp2"]),
        ("qwen32b_sft", ["train.recompute=none"]),
        ("llama70b_sft", ["parallel=gpus_16_tp8_pp2", "train.recompute=full"]),
    ],
)
def test_what_a_comment_rules_out_does_not_fit(
    name: str, given: list[str], door: Door, tmp_path: Path
) -> None:
    assert memory_gib(plan_of(door, tmp_path, name, *given)) > PRESETS[name][2]
