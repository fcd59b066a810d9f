"""A HuggingFace folder as a checkpoint, and back: for Megatron-Core, for our engine, for people."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from roll_sft.checkpoint.resume import start_from
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.convert import command
from roll_sft.job.in_process import prepare_job
from tests import parity
from tests.checkpoint.test_resume import steps_of
from tests.convert.test_roundtrip import KINDS, LAYOUTS
from tests.pool import RankPool

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<kind>/model` and the checkpoint `<kind>/megatron` made of it, for every family."""
    home = tmp_path_factory.mktemp("convert")
    parity.write_rows(home / "rows.jsonl")
    for kind in KINDS:
        parity.write_model(home / kind / "model", kind=kind)
        paths = ["--model", str(home / kind / "model"), "--output", str(home / kind / "megatron")]
        assert command.main(paths) == 0
    return home


def load_with_megatron(config: RunConfig, home: Path) -> dict[str, str]:
    """Parameters that Megatron-Core's own load gives other numbers than ours. In a pool."""
    import dataclasses

    from megatron.core import dist_checkpointing

    from roll_sft.engine import build
    from roll_sft.engine.engine import Engine

    different = {}
    for kind in KINDS:
        model = dataclasses.replace(config.model, path=str(home / kind / "model"))
        job = prepare_job(dataclasses.replace(config, model=model))
        engine = Engine(job.config, source=job.source, data=job.data)
        expected = {n: p.detach().clone() for n, p in build.named_parameters(engine.chunks)}
        for parameter in (p for chunk in engine.chunks for p in chunk.parameters()):
            parameter.data.fill_(torch.nan)
        states = {str(i): chunk.sharded_state_dict() for i, chunk in enumerate(engine.chunks)}
        folder = str(home / kind / "megatron")
        loaded = dist_checkpointing.load(states, folder, strict="raise_all")
        for index, chunk in enumerate(engine.chunks):
            chunk.load_state_dict(loaded[str(index)])
        for name, parameter in build.named_parameters(engine.chunks):
            if not torch.equal(parameter, expected[name]):
                different[f"{kind} {name}"] = str((parameter - expected[name]).abs().max())
    return different


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_core_loads_what_a_model_was_converted_to(
    layout: str, home: Path, pool: RankPool
) -> None:
    config = parity.parity_config(
        home, parallel=LAYOUTS[layout], model={"path": str(home / KINDS[0] / "model")}
    )
    assert pool.run(load_with_megatron, layout_of(config.parallel), config, home) == [
        {} for _ in range(config.parallel.num_workers)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_every_tensor_is_as_it_was(
    kind: str, home: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    paths = [str(home / kind / "megatron"), "--output", str(tmp_path / "hf"), "--verify"]
    assert command.main(paths) == 0
    assert [each.message for each in recwarn if each.category is UserWarning] == []
    source = load_file(home / kind / "model" / "model.safetensors")
    back = load_file(tmp_path / "hf" / "model.safetensors")
    assert back.keys() == source.keys()
    for name, tensor in source.items():
        assert torch.equal(back[name], tensor), name


def test_a_tensor_that_nobody_reads_is_named(home: Path, tmp_path: Path) -> None:
    from roll_sft.base.errors import CheckpointError
    from roll_sft.checkpoint.reader import Reader

    reader = Reader(home / "qwen2" / "megatron")
    reader.read("decoder.layers.0.mlp.linear_fc1.weight")
    with pytest.raises(CheckpointError, match=r"decoder\.\S+ has \d+ numbers, .* \d+ of them"):
        reader.check_all_read()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_starts_from_a_converted_model_as_from_the_model(
    layout: str, home: Path, pool: RankPool
) -> None:
    kind = KINDS[0]
    config = parity.parity_config(
        home, parallel=LAYOUTS[layout], model={"path": str(home / kind / "model")}
    )
    job, folder = prepare_job(config), home / kind / "megatron"
    assert start_from(folder, job.state, allowed=()).step == 0
    runs = [
        pool.run(steps_of, layout_of(config.parallel), config, 1, 2, loads, None)
        for loads in (None, folder)
    ]
    assert runs[0] == runs[1]


# A converter that is killed where it has written a part.
KILLED = """
import os, signal, sys
from roll_sft.convert import command, to_hf, from_hf

def killed_after(number, original):
    def part(*args, **options):
        for count, value in enumerate(original(*args, **options)):
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            yield value
    return part

to_hf._hf_tensors = killed_after(5, to_hf._hf_tensors)
from_hf._pieces = killed_after(5, from_hf._pieces)
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("source", [pytest.param("model", marks=pytest.mark.long), "megatron"])
def test_a_killed_conversion_leaves_no_model_and_is_done_again(
    source: str, home: Path, tmp_path: Path
) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.name not in ("README.md", ".metadata")
        }

    kind = KINDS[0]
    arguments = [str(home / kind / source), "--output", str(tmp_path / "out" / "made")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert not (tmp_path / "out" / "made").exists()
    assert command.main(arguments) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["made"]
    arguments[-1] = str(tmp_path / "other" / "made")
    assert command.main(arguments) == 0
    assert files(tmp_path / "out" / "made") == files(tmp_path / "other" / "made")
