"""Which checkpoint a run goes on from, whatever happened to the folder: without processes."""

import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

from roll_sft.base.errors import CheckpointError, ConfigError, ResourceError
from roll_sft.checkpoint import publish, tensors
from roll_sft.checkpoint.manifest import MANIFEST
from roll_sft.checkpoint.publish import publish_step, staging_folder
from roll_sft.checkpoint.resume import Start, find_checkpoint, make_way, start_from, step_folders
from roll_sft.checkpoint.tensors import Piece, Writer
from roll_sft.config.schema import CheckpointConfig
from roll_sft.job.in_process import prepare_job
from roll_sft.job.job import Job
from roll_sft.training import saves
from roll_sft.training.retain import retain
from roll_sft.training.saves import check_room
from tests import parity

SHARD = "__0_0.distcp"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    root = tmp_path_factory.mktemp("choice")
    parity.write_model(root / "model", kind="qwen2-tied", num_layers=1)
    parity.write_rows(root / "rows.jsonl")
    return prepare_job(parity.parity_config(root))


def changed(job: Job, **sections: Any) -> Job:
    """`job` with other values, section by section, planned anew."""
    config = job.config
    for name, values in sections.items():
        value = replace(getattr(config, name), **values) if isinstance(values, dict) else values
        config = replace(config, **{name: value})
    return prepare_job(config)


def find_start(job: Job, checkpoints: Path) -> Start:
    return start_from(
        find_checkpoint(job.config, checkpoints),
        job.state,
        allowed=job.config.checkpoint.allow_changes,
    )


def write_shard(staging: Path) -> None:
    piece = Piece("weight", (8, 4), (0, 0), torch.arange(32.0).view(8, 4))
    tensors.write(staging, [piece], objects={}, writer=Writer(0, 1, optimizer_step=1))


def save(job: Job, checkpoints: Path, step: int) -> Path:
    staging = staging_folder(checkpoints, step)
    write_shard(staging)
    return publish_step(
        job.state, job.planner.step(step), staging=staging, save_assets=job.save_assets
    )


# Which one


def test_a_folder_without_checkpoints_begins_at_the_beginning(job: Job, tmp_path: Path) -> None:
    for name in ("steps", "step_", "step_12.tmp", ".staging_00000003"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000007").write_text("a file")
    (tmp_path / "step_00000008").symlink_to(tmp_path / "steps")
    assert find_start(job, tmp_path) == Start(0, None)
    assert find_start(job, tmp_path / "absent") == Start(0, None)


def test_the_newest_is_found_by_number_and_not_by_name_or_by_latest(
    job: Job, tmp_path: Path
) -> None:
    for step in (9, 10, 2):
        save(job, tmp_path, step)
    (tmp_path / "step_00000010").rename(tmp_path / "step_10")
    for torn in ("step_00000009", "", "garbage \0", None):
        if torn is None:
            (tmp_path / "latest").unlink()
        else:
            (tmp_path / "latest").write_text(torn)
        start = find_start(job, tmp_path)
        assert start == Start(10, tmp_path / "step_10")
    make_way(tmp_path, start)
    assert (tmp_path / "latest").read_text() == "step_10\n"


def test_what_stands_in_the_way_of_latest_is_named(job: Job, tmp_path: Path) -> None:
    save(job, tmp_path, 2)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    with pytest.raises(ResourceError, match=r"\blatest: .*Is a directory"):
        make_way(tmp_path, find_start(job, tmp_path))


class Damage(NamedTuple):
    do: Callable[[Path], object]
    named: str


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def forge_a_hash(path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["files"][SHARD]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))


DAMAGES = {
    "a flipped bit": Damage(lambda folder: flip_a_bit(folder / SHARD), SHARD),
    "a shard cut short": Damage(lambda folder: cut(folder / SHARD), SHARD),
    "a shard gone": Damage(lambda folder: (folder / SHARD).unlink(), SHARD),
    "empty metadata": Damage(lambda folder: (folder / ".metadata").write_bytes(b""), ".metadata"),
    "another hash": Damage(lambda folder: forge_a_hash(folder / MANIFEST), SHARD),
    "a manifest cut short": Damage(lambda folder: cut_in_half(folder / MANIFEST), MANIFEST),
    "no manifest": Damage(lambda folder: (folder / MANIFEST).unlink(), MANIFEST),
    "a manifest of nothing": Damage(lambda folder: (folder / MANIFEST).write_text("[]"), MANIFEST),
}


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_passed_over_and_kept(
    damage: str, job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 4):
        save(job, tmp_path, step)
    DAMAGES[damage].do(tmp_path / "step_00000004")
    start = find_start(job, tmp_path)
    assert start == Start(2, tmp_path / "step_00000002")
    (line,) = [each.message for each in caplog.records if each.levelno == logging.ERROR]
    assert line.startswith("NOT resuming from step_00000004")
    assert DAMAGES[damage].named in line
    make_way(tmp_path, start)
    assert step_folders(tmp_path) == [tmp_path / "step_00000002"]
    assert (tmp_path / "latest").read_text() == "step_00000002\n"
    assert (tmp_path / ".set_aside_step_00000004").is_dir()
    save(job, tmp_path, 4)  # as the run does that goes on
    assert find_start(job, tmp_path).step == 4


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_none_is_whole_the_run_ends_with_the_code_of_checkpoints(
    damage: str, job: Job, tmp_path: Path
) -> None:
    folder = save(job, tmp_path, 2)
    DAMAGES[damage].do(folder)
    with pytest.raises(CheckpointError, match=r"\b1 checkpoints?\b.*output_dir"):
        find_start(job, tmp_path)
    with pytest.raises(CheckpointError, match=DAMAGES[damage].named):
        find_start(changed(job, resume=str(folder)), tmp_path)
    assert folder.is_dir()
    assert CheckpointError.exit_code == 6


def test_without_verification_sizes_still_count(job: Job, tmp_path: Path) -> None:
    trusting = changed(job, checkpoint={"verify": False})
    for step in (2, 4):
        save(job, tmp_path, step)
    flip_a_bit(tmp_path / "step_00000004" / SHARD)
    assert find_start(trusting, tmp_path).step == 4
    cut(tmp_path / "step_00000004" / SHARD)
    assert find_start(trusting, tmp_path).step == 2


def test_a_step_folder_can_be_named_and_those_after_it_are_set_aside(
    job: Job, tmp_path: Path
) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    for step in (2, 4, 6):
        save(job, own, step)
    save(job, other, 8)
    back = find_start(changed(job, resume=str(own / "step_00000002")), own)
    assert back == Start(2, own / "step_00000002")
    make_way(own, back)
    assert [path.name for path in step_folders(own)] == ["step_00000002"]
    assert len([*own.glob(".set_aside_*")]) == 2
    branch = changed(job, resume=str(other / "step_00000008"))
    assert find_start(branch, tmp_path / "new") == Start(8, other / "step_00000008")
    with pytest.raises(ConfigError, match=r"^resume: .*step 1\b.*output_dir"):
        find_start(branch, own)
    # The same command after a crash goes on from what it has made itself.
    make_way(tmp_path / "new", Start(8, other / "step_00000008"))
    save(job, tmp_path / "new", 10)
    assert find_start(branch, tmp_path / "new") == Start(10, tmp_path / "new" / "step_00000010")
    save(job, other, 9)
    again = changed(job, resume=str(other / "step_00000009"))
    with pytest.raises(ConfigError, match=r"^resume: .*other/step_00000008\b.*output_dir"):
        find_start(again, tmp_path / "new")


@pytest.mark.parametrize("has_own", [False, True], ids=["new", "with checkpoints"])
def test_resume_names_a_step_folder_or_the_run_does_not_start(
    has_own: bool, job: Job, tmp_path: Path
) -> None:
    own = tmp_path / "run" / "checkpoints"
    if has_own:
        save(job, own, 4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "__0_0.distcp").write_text("half")
    save(job, tmp_path / "other" / "checkpoints", 8)
    for name, kind, said in (
        ("step_00000009", ConfigError, "does not exist; give a step folder"),
        ("empty", ConfigError, "is an empty folder"),
        ("file", ConfigError, "is a file"),
        ("unfinished", CheckpointError, "no readable manifest.json"),
        ("other", ConfigError, "its newest is resume=.*other/checkpoints/step_00000008$"),
        ("other/checkpoints", ConfigError, "its newest is resume=.*step_00000008$"),
    ):
        with pytest.raises(kind, match=said):
            find_start(changed(job, resume=str(tmp_path / name)), own)


def test_a_schedule_that_changed_is_told_by_its_keys_and_only_by_those_it_uses(
    job: Job, tmp_path: Path
) -> None:
    save(job, tmp_path, 2)
    other = changed(job, train={"max_steps": 20, "learning_rate": 1e-4})
    with pytest.raises(ConfigError) as caught:
        find_start(other, tmp_path)
    told = str(caught.value).partition("schedule (")[2].partition(");")[0]
    assert told == "learning_rate 0.0005 is now 0.0001; total_steps 8 is now 20"


# Whether it may


CHANGES: dict[str, dict[str, Any]] = {
    "global_batch_size": {"train": {"global_batch_size": 5, "max_steps": 8}},
    "seed": {"seed": 7},
    "sequence_length": {"data": {"sequence_length": 190}},
    "schedule": {"train": {"max_steps": 20}},
    "optimizer": {"train": {"weight_decay": 0.0}},
    "data": {"data": {"shuffle": False}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused_by_name_unless_it_is_asked_for(
    name: str, job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(job, tmp_path, 2)
    other = changed(job, **CHANGES[name])
    with pytest.raises(ConfigError) as caught:
        find_start(other, tmp_path)
    assert f"differs in {name} (" in str(caught.value)
    assert f"checkpoint.allow_changes=[{name}]" in str(caught.value)
    allowed = replace(
        other,
        config=replace(other.config, checkpoint=CheckpointConfig(allow_changes=[name])),
    )
    assert find_start(allowed, tmp_path).step == 2
    assert f"with another {name}" in caplog.text
    again = save(other, tmp_path, 4)  # what it goes on with is in its own manifest
    assert find_start(other, tmp_path) == Start(4, again)


def test_changed_rows_tokenizer_and_template_are_told_apart(job: Job, tmp_path: Path) -> None:
    save(job, tmp_path / "run", 2)
    root = Path(job.config.model.path or "").parent
    moved = tmp_path / "assets"
    shutil.copytree(root, moved)
    same = changed(
        job,
        model={"path": str(moved / "model")},
        data={"train": [replace(job.config.data.train[0], path=str(moved / "rows.jsonl"))]},
    )
    assert find_start(same, tmp_path / "run").step == 2, "only the place is another"
    rows = moved / "rows.jsonl"
    rows.write_text(rows.read_text() + rows.read_text().splitlines()[0] + "\n")
    with pytest.raises(ConfigError, match=r"^resume: .*\bdata \("):
        find_start(prepare_job(same.config), tmp_path / "run")
    shutil.copy(root / "rows.jsonl", rows)
    template = moved / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("You are a", "You are no"))
    with pytest.raises(ConfigError, match=r"^resume: .*\bchat_template \("):
        find_start(prepare_job(same.config), tmp_path / "run")
    template.write_text(template.read_text() + "{%- if enable_thinking %}{%- endif %}")
    save(prepare_job(same.config), tmp_path / "variable", 2)
    other = changed(same, data={"template_kwargs": {"enable_thinking": False}})
    expected = r"differs in template_kwargs \(enable_thinking None is now False\)"
    with pytest.raises(ConfigError, match=expected):
        find_start(other, tmp_path / "variable")
    shutil.copy(root / "model" / "chat_template.jinja", template)
    tokenizer = moved / "model" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["merges"].pop()
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"\btokenizer \(.*allow_changes=\[tokenizer\]"):
        find_start(prepare_job(same.config), tmp_path / "run")


def test_layout_packing_and_micro_batches_are_no_change(job: Job, tmp_path: Path) -> None:
    save(job, tmp_path, 2)
    other = changed(
        job,
        parallel={"num_workers": 2, "context_parallel_size": 2},
        data={"packing": False},
        train={"micro_batch_tokens": 400, "recompute": "full"},
    )
    assert find_start(other, tmp_path).step == 2
    with pytest.raises(ConfigError, match=r"model\.dtype: 'bf16'"):
        find_start(changed(job, model={"dtype": "bf16"}), tmp_path)


@pytest.mark.parametrize("packing", [True, False])
def test_from_every_step_on_the_samples_come_in_the_same_order(packing: bool, job: Job) -> None:
    data = {"packing": packing}
    straight = changed(job, data=data, train={"num_train_epochs": 3})
    orders = [straight.planner.step(step).sample_ids for step in range(1, straight.total_steps + 1)]
    assert straight.total_steps == 3 * straight.planner.steps_per_epoch
    assert len({*orders}) == len(orders)
    for first in range(1, straight.total_steps + 1):
        planner = changed(straight, parallel={"num_workers": 2}).planner
        steps = range(first, straight.total_steps + 1)
        assert [planner.step(step).sample_ids for step in steps] == orders[first - 1 :]


# What a save leaves behind that does not come to its end


def in_a_child(action: Callable[[], object]) -> tuple[int | None, str]:
    """Exit code of a forked process that does `action`, and the error it ended with."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def work() -> None:
        try:
            action()
            theirs.send("")
        except CheckpointError as error:
            theirs.send(str(error))

    child = context.Process(target=work)
    child.start()
    theirs.close()
    child.join(60)
    try:
        text = ours.recv()
    except EOFError:
        text = ""
    return child.exitcode, text


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_latest(path: Path, text: str) -> None:
    if path.name == "latest":
        die()
    path.write_text(text)


class DyingTee(tensors._Tee):
    def write(self, data: memoryview) -> int:
        if self.position > 100:
            die()
        return super().write(data)


KILLS: dict[str, Any] = {
    "before a byte is written": lambda: patch.object(tensors, "_write_file", die),
    "in the middle of a shard": lambda: patch.object(tensors, "_Tee", DyingTee),
    "after the shards": lambda: patch.object(tensors, "take_parts", die),
    "before the manifest": lambda: patch.object(publish, "write_durably", die),
    "between manifest and rename": lambda: patch.object(Path, "rename", die),
    "between rename and latest": lambda: patch.object(publish, "write_durably", die_at_latest),
}


@pytest.mark.parametrize("point", KILLS)
def test_a_save_killed_at_any_point_leaves_the_one_before_or_the_whole(
    point: str, job: Job, tmp_path: Path
) -> None:
    save(job, tmp_path, 2)

    def killed() -> None:
        with KILLS[point]():
            save(job, tmp_path, 4)

    code, _ = in_a_child(killed)
    assert code == -signal.SIGKILL, "the fault did not happen"
    start = find_start(job, tmp_path)
    assert start.step == (4 if point == "between rename and latest" else 2)
    make_way(tmp_path, start)
    assert not [*tmp_path.glob(".staging_*")]
    assert (tmp_path / "latest").read_text().strip() == start.checkpoint.name
    assert find_start(job, tmp_path) == start


def test_a_full_disk_ends_the_save_in_one_line_and_leaves_the_one_before(
    job: Job, tmp_path: Path
) -> None:
    save(job, tmp_path, 2)

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
        save(job, tmp_path, 4)

    code, text = in_a_child(full)
    assert code == 0
    assert "cannot be written" in text
    assert "are free" in text
    assert "\n" not in text
    assert find_start(job, tmp_path) == Start(2, tmp_path / "step_00000002")


def test_a_rank_that_did_not_finish_is_named_and_nothing_is_published(
    job: Job, tmp_path: Path
) -> None:
    staging = staging_folder(tmp_path, 4)
    tensors.write(staging, [], objects={}, writer=Writer(0, 2, optimizer_step=1))
    with pytest.raises(CheckpointError, match=r"\brank 1\b"):
        publish_step(job.state, job.planner.step(4), staging=staging, save_assets=job.save_assets)
    assert step_folders(tmp_path) == []


# Which are kept, and whether there is room


def test_the_last_ones_and_the_best_are_kept(job: Job, tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}
    config = CheckpointConfig(keep_last=2, keep_best="held_out")
    for step in (1, 2, 3, 4):
        save(job, tmp_path, step)
        retain(tmp_path, config, losses=losses)
    assert [path.name[-1] for path in step_folders(tmp_path)] == ["2", "3", "4"]
    save(job, tmp_path, 5)
    retain(tmp_path, config, losses={**losses, 5: 0.5})
    assert [path.name[-1] for path in step_folders(tmp_path)] == ["4", "5"]
    assert not [*tmp_path.glob(".deleted_*")]


def test_nothing_is_deleted_before_the_newest_is_whole_or_where_it_cannot_be(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        save(job, tmp_path, step)
    (tmp_path / "step_00000003" / SHARD).unlink()
    retain(tmp_path, CheckpointConfig(keep_last=2), losses={})
    assert len(step_folders(tmp_path)) == 3
    assert "no checkpoint is deleted" in caplog.text
    save(job, tmp_path, 4)
    with patch.object(saves.shutil, "rmtree", side_effect=OSError("busy")):
        retain(tmp_path, CheckpointConfig(keep_last=2), losses={})
    assert "step_00000001 (busy)" in caplog.text
    assert find_start(job, tmp_path).step == 4


def has_room(run: Job, checkpoints: Path, *, sizes: float, first_step: int = 0) -> bool:
    """Whether the rest of `run` may begin on a disk with room for `sizes` checkpoints."""
    size = saves.checkpoint_bytes(run.config, run.source.shape)
    usage = shutil.disk_usage(checkpoints.parent)._replace(free=int(sizes * size))
    with patch.object(saves.shutil, "disk_usage", return_value=usage):
        try:
            check_room(
                run.config,
                run.source.shape,
                checkpoints,
                first_step=first_step,
                total_steps=run.total_steps,
            )
        except ResourceError:
            return False
    return True


def test_room_for_all_checkpoints_is_asked_for_before_training(job: Job, tmp_path: Path) -> None:
    size = saves.checkpoint_bytes(job.config, job.source.shape)
    assert size == 12 * job.source.shape.num_parameters
    run = changed(job, train={"max_steps": 10, "save_steps": 2}, checkpoint={"keep_last": 2})
    checkpoints = tmp_path / "checkpoints"
    assert has_room(run, checkpoints, sizes=3)
    everything = changed(run, checkpoint={"keep_last": None})
    assert not has_room(everything, checkpoints, sizes=4.9)
    assert has_room(everything, checkpoints, sizes=5)
    assert has_room(everything, checkpoints, sizes=3, first_step=4)
    assert has_room(changed(everything, checkpoint={"save": False}), checkpoints, sizes=0)


def test_checkpoints_that_lie_there_count_as_room_for_those_that_replace_them(
    job: Job, tmp_path: Path
) -> None:
    run = changed(job, train={"max_steps": 10, "save_steps": 2}, checkpoint={"keep_last": 2})
    size = saves.checkpoint_bytes(run.config, run.source.shape)
    checkpoints = tmp_path / "checkpoints"

    def there(name: str) -> None:
        (checkpoints / name).mkdir(parents=True)
        with (checkpoints / name / "file").open("wb") as file:
            file.truncate(size)

    there("step_00000002")
    assert not has_room(run, checkpoints, sizes=1.9, first_step=2)
    assert has_room(run, checkpoints, sizes=2, first_step=2)
    there("step_00000004")
    assert has_room(run, checkpoints, sizes=1, first_step=4), "each new one replaces an old one"
    assert not has_room(run, checkpoints, sizes=0.9, first_step=4)
    there(".staging_00000006")
    assert has_room(run, checkpoints, sizes=0, first_step=4), "what is half written is removed"
    best = changed(
        run, data={"validation": run.config.data.train}, checkpoint={"keep_best": "rows"}
    )
    assert not has_room(best, checkpoints, sizes=0.9, first_step=4), "the best one may stay"
    # One that the run sets aside is not deleted, and so makes no room.
    assert not has_room(run, checkpoints, sizes=0.9, first_step=2)
