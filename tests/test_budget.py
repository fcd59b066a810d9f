"""What one run makes a reader open: modules and lines of the stages that prepare and that train.

Preparing is read in two parts: what the model is, and how rows become tokens.

Counted from the entries of a stage over all imports, those in functions included. Left out is what
a plain run does not load: a full fine-tune of one family on GPUs, of a JSON Lines file of chats,
without trackers. A real run shows that it loads nothing else.
"""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests import doors
from tests.test_floors import ROOT, imported_modules, module_path, parsed

assets, arguments = doors.assets, doors.arguments

TRAIN = (
    "roll_sft/training/driver.py",
    "roll_sft/engine/engine.py",
    "roll_sft/models/families/qwen.py",
)
PREPARE = ("roll_sft/preparing.py",)
MODEL = ("roll_sft/job/model.py", "roll_sft/models/families/qwen.py")
MOST = {TRAIN: (48, 9_000), PREPARE: (30, 5_000), MODEL: (20, 2_550)}  # modules, lines

# The estimate of memory, which the plan shows before a run trains, and a warning repeats.
OF_PLAN = ("roll_sft/job/memory.py",)
# Opening a config.json, which preparing does for training.
OF_MODEL = ("roll_sft/models/decoder_shape.py",)
# The section `cluster`, which training reads; preparing has its address alone.
OF_CLUSTER = ("roll_sft/config/cluster.py",)
# Read by itself, in another part or with its own budget.
APART = {
    TRAIN: (*OF_MODEL, *OF_PLAN),
    PREPARE: ("roll_sft/job/model.py", "roll_sft/models/", *OF_CLUSTER),
    MODEL: OF_CLUSTER,
}

# Loaded where it is needed, which is not in a plain run.
BY_NEED = {
    "roll_sft/checkpoint/background.py": "checkpoint.async_save",
    "roll_sft/checkpoint/choice.py": "a run that goes on from a checkpoint",
    "roll_sft/checkpoint/fingerprint.py": "a run that goes on from a checkpoint",
    "roll_sft/checkpoint/index.py": "a run that goes on from a checkpoint",
    "roll_sft/config/evolve.py": "the Python API",
    "roll_sft/config/debug.py": "debug.faults",
    "roll_sft/config/export.py": "a model that is pushed",
    "roll_sft/base/generation.py": "evaluation.prompts",
    "roll_sft/config/evaluation.py": "evaluation.prompts",
    "roll_sft/config/keeping.py": "keys of train that a plain run leaves alone",
    "roll_sft/config/lora.py": "lora.rank above 0",
    "roll_sft/config/moe.py": "a model with experts",
    "roll_sft/config/recipes.py": "keys of train that a plain run leaves alone",
    "roll_sft/config/tracking.py": "trackers",
    "roll_sft/convert/each_save.py": "checkpoint.hf_export=every_save",
    "roll_sft/data/chat/advice.py": "rows that the template cannot write",
    "roll_sft/data/chat/control_text.py": "rows that spell control tokens",
    "roll_sft/data/chat/cut_text.py": "tokens that span the end of a header",
    "roll_sft/data/chat/documents.py": "rows of plain text",
    "roll_sft/data/chat/fast/": "what only makes rendering quicker",
    "roll_sft/data/chat/generation_prompt.py": "evaluation.prompts",
    "roll_sft/data/chat/reasoning.py": "reasoning, in a row or in the generation prompt",
    "roll_sft/data/chat/template_budget.py": "templates that may build texts upon themselves",
    "roll_sft/data/chat/templates.py": "a template that is given or advised",
    "roll_sft/data/chat/tool_rendering.py": "tools",
    "roll_sft/data/rows/compressed.py": "files that are compressed",
    "roll_sft/data/rows/content_parts.py": "messages made of parts",
    "roll_sft/data/rows/file_lists.py": "folders, patterns and URLs",
    "roll_sft/data/rows/hub.py": "a data set of the hub",
    "roll_sft/data/rows/instruction_rows.py": "rows that are no chats",
    "roll_sft/data/rows/json_array.py": "a file that is one JSON array",
    "roll_sft/data/rows/json_values.py": "values that are JSON texts, and tools",
    "roll_sft/data/rows/message_fields.py": "messages with more than a role and a text",
    "roll_sft/data/rows/questions.py": "evaluation.prompts",
    "roll_sft/data/rows/remote_files.py": "object stores",
    "roll_sft/data/rows/row_weight.py": "rows with a weight",
    "roll_sft/data/rows/saved_folders.py": "a folder that `datasets` wrote",
    "roll_sft/data/rows/table_rows.py": "Parquet and Arrow files",
    "roll_sft/data/rows/template_kwargs.py": "rows that set variables of the template",
    "roll_sft/data/rows/tool_calls.py": "tools",
    "roll_sft/data/steps/more_schedules.py": "schedules with a parameter of their own",
    "roll_sft/data/steps/objective.py": "another loss than the mean of tokens",
    "roll_sft/data/tokens/dropped_rows.py": "rows that are dropped",
    "roll_sft/data/tokens/truncate.py": "samples that are cut",
    "roll_sft/data/tokens/workers.py": "data of more than 64 MiB",
    "roll_sft/engine/adapters/": "lora.rank above 0",
    "roll_sft/engine/attention_packages.py": "attention kernels that are installed apart",
    "roll_sft/engine/moe/": "a model with experts",
    "roll_sft/engine/cpu_backend.py": "a run without GPUs",
    "roll_sft/engine/recipes/": "adapters, frozen parameters, noise, another loss, groups, spikes",
    "roll_sft/engine/generation/": "evaluation.prompts",
    "roll_sft/engine/without_compiler.py": "a run without GPUs",
    "roll_sft/evaluation/": "evaluation.prompts",
    "roll_sft/engine/variations/": "a model that is no plain decoder",
    "roll_sft/engine/load_state.py": "a run that goes on from a checkpoint",
    "roll_sft/engine/validation.py": "a validation set",
    "roll_sft/engine/overlap.py": "weights gathered in the forward pass, on several GPUs",
    "roll_sft/engine/recompute.py": "norms that are recomputed",
    "roll_sft/engine/step_timer.py": "several data ranks",
    "roll_sft/job/expert_memory.py": "a model with experts",
    "roll_sft/job/experts.py": "a model with experts",
    "roll_sft/job/lora.py": "lora.rank above 0",
    "roll_sft/job/lora_memory.py": "lora.rank above 0",
    "roll_sft/job/prompts.py": "evaluation.prompts",
    "roll_sft/job/trained.py": "lora.rank above 0, and train.freeze",
    "roll_sft/base/expert_load.py": "a model with experts",
    "roll_sft/models/moe/": "a model with experts",
    "roll_sft/models/stored_shape.py": "a model that is no plain decoder",
    "roll_sft/models/adapters/": "lora.rank above 0",
    "roll_sft/models/frozen.py": "train.freeze",
    "roll_sft/models/files/hub.py": "a model of the hub",
    "roll_sft/models/module_names.py": "patterns of modules, in train.freeze and others",
    "roll_sft/models/fused_rows.py": "a family that fuses projections",
    "roll_sft/models/files/remote_code.py": "model.trust_remote_code",
    "roll_sft/models/rotary.py": "rotary embeddings that are scaled or partial",
    "roll_sft/models/variation.py": "a model that is no plain decoder",
    "roll_sft/models/random_weights.py": "a model that starts from random weights",
    "roll_sft/runtime/draining.py": "a cluster that others started",
    "roll_sft/runtime/failures.py": "workers that fail",
    "roll_sft/runtime/faults.py": "debug.faults",
    "roll_sft/runtime/rank_faults.py": "workers that fail",
    "roll_sft/runtime/regroup.py": "workers that fail",
    "roll_sft/runtime/watchdog.py": "a phase that runs out of time",
    "roll_sft/runtime/shortfall.py": "resources that a cluster lacks",
    "roll_sft/runtime/joining.py": "a cluster that others started",
    "roll_sft/runtime/preparation.py": "data prepared by a cluster",
    "roll_sft/runtime/killed_start.py": "a run that ends while its cluster starts",
    "roll_sft/runtime/short_folder.py": "a folder for temporary files with a long name",
    "roll_sft/runtime/store_gate.py": "ranks on several nodes",
    "roll_sft/training/evaluations.py": "a validation set",
    "roll_sft/training/generations.py": "evaluation.prompts",
    "roll_sft/training/early_stopping.py": "train.early_stopping",
    "roll_sft/training/cut_logs.py": "a folder that has logs",
    "roll_sft/training/way_back.py": "a run that diverged",
    "roll_sft/training/retain.py": "more checkpoints than are kept",
    "roll_sft/training/supervisor.py": "workers that fail",
    "roll_sft/training/notebook.py": "a run in a notebook",
    "roll_sft/training/bad_batches.py": "bad steps, and a run that goes on",
    "roll_sft/training/preempted.py": "a run that is asked to end",
    "roll_sft/training/stragglers.py": "several data ranks",
    "roll_sft/tracking/": "trackers",
}
# A small source is encoded quickly, too; without these the ids are the same. The sections `debug`,
# `export`, `lora`, `moe`, `tracking` and the keys of recipes are loaded for their defaults.
ALLOWED = (
    "roll_sft/config/debug.py",
    "roll_sft/config/export.py",
    "roll_sft/config/evaluation.py",
    "roll_sft/config/keeping.py",
    "roll_sft/config/lora.py",
    "roll_sft/config/moe.py",
    "roll_sft/config/recipes.py",
    "roll_sft/config/tracking.py",
    "roll_sft/data/chat/fast/",
    "roll_sft/engine/cpu_backend.py",
    "roll_sft/engine/without_compiler.py",
)

# Notes every module of ours that a process imports, in a file of its own.
SITE = """
import os, sys
from importlib.machinery import PathFinder
class Noting:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("roll_sft."):
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None and spec.origin:
                with open(os.path.join(os.environ["NOTES"], str(os.getpid())), "a") as notes:
                    notes.write(spec.origin + "\\n")
        return None
sys.meta_path.insert(0, Noting())
"""


def opened(entries: Iterable[str], but: Iterable[str] = ()) -> set[str]:
    """The modules that a reader of `entries` opens, package docstrings left out."""
    seen, todo = set[str](), list(entries)
    while todo:
        path = todo.pop()
        if path in seen or path.startswith((*BY_NEED, *but)) or path.endswith("__init__.py"):
            continue
        seen.add(path)
        modules = (module for module, _ in imported_modules(parsed(path), path))
        todo.extend(filter(None, map(module_path, modules)))
    return seen


@pytest.mark.parametrize("entries", MOST, ids=["train", "prepare", "model"])
def test_a_stage_can_be_read(entries: tuple[str, ...]) -> None:
    found = opened(entries, APART.get(entries, ()))
    lines = sum(len((ROOT / path).read_text().splitlines()) for path in found)
    most_modules, most_lines = MOST[entries]
    listed = "\n".join(sorted(found))
    assert len(found) <= most_modules, listed
    assert lines <= most_lines, f"{lines} lines in\n{listed}"


def test_what_is_loaded_by_need_is_there() -> None:
    for path in BY_NEED:
        assert (ROOT / path).exists(), path


@pytest.mark.slow
def test_a_plain_run_opens_nothing_else(arguments: list[str], tmp_path: Path) -> None:
    chats, turn = tmp_path / "chats.jsonl", {"role": "user", "content": "the sum of two numbers"}
    row = {"messages": [turn, {"role": "assistant", "content": "is a number"}]}
    doors.write_rows(chats, [row] * 20)
    (tmp_path / "site").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    command = [sys.executable, "-m", "roll_sft.run", *arguments, f"output_dir={tmp_path / 'run'}"]
    command += ["train.max_steps=2", "checkpoint.hf_export=none", f"data.train=[{{path: {chats}}}]"]
    paths = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    environment = {"PYTHONPATH": paths, "NOTES": str(tmp_path / "notes"), "HOME": str(tmp_path)}
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = [
        {str(Path(line).relative_to(ROOT)) for line in notes.read_text().splitlines()}
        for notes in (tmp_path / "notes").iterdir()
    ]
    driver = next(each for each in loaded if "roll_sft/training/driver.py" in each)
    worker = next(each for each in loaded if "roll_sft/engine/engine.py" in each)
    prepare = next(each for each in loaded if "roll_sft/job/prepare.py" in each)
    plain = {path for path in driver | worker | prepare if not path.startswith(ALLOWED)}
    assert not {path for path in plain if path.startswith(tuple(BY_NEED))}
    assert not set(OF_MODEL) & (driver | worker)
    assert not {path for path in driver if path.startswith("roll_sft/data/rows/")}
    assert not {path for path in driver | worker if path.startswith("roll_sft/data/chat/")}
