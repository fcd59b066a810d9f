"""A HuggingFace folder as a checkpoint, and back: for Megatron-Core, for our engine, for people."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from roll_sft.config import RunConfig, layout_of
from roll_sft.engine import convert
from roll_sft.engine.preflight import prepare
from tests import parity
from tests.engine.test_roundtrip import KINDS, LAYOUTS
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
        assert convert.main(paths) == 0
    return home


def load_with_megatron(config: RunConfig, home: Path) -> dict[str, str]:
    """Parameters that Megatron-Core's own load gives other numbers than ours. In a pool."""
    import dataclasses

    from megatron.core import dist_checkpointing

    from roll_sft.engine import setup
    from roll_sft.engine.engine import Engine

    different = {}
    for kind in KINDS:
        model = dataclasses.replace(config.model, path=str(home / kind / "model"))
        job = prepare(dataclasses.replace(config, model=model))
        engine = Engine(job.config, source=job.source, data=job.data)
        expected = {n: p.detach().clone() for n, p in setup.named_parameters(engine.chunks)}
        for parameter in (p for chunk in engine.chunks for p in chunk.parameters()):
            parameter.data.fill_(torch.nan)
        states = {str(i): chunk.sharded_state_dict() for i, chunk in enumerate(engine.chunks)}
        folder = str(home / kind / "megatron")
        loaded = dist_checkpointing.load(states, folder, strict="raise_all")
        for index, chunk in enumerate(engine.chunks):
            chunk.load_state_dict(loaded[str(index)])
        for name, parameter in setup.named_parameters(engine.chunks):
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
def test_there_and_back_every_tensor_is_as_it_was(kind: str, home: Path, tmp_path: Path) -> None:
    paths = [str(home / kind / "megatron"), "--output", str(tmp_path / "hf")]
    assert convert.main(paths) == 0
    source = load_file(home / kind / "model" / "model.safetensors")
    back = load_file(tmp_path / "hf" / "model.safetensors")
    assert back.keys() == source.keys()
    for name, tensor in source.items():
        assert torch.equal(back[name], tensor), name


def test_a_tensor_that_nobody_reads_is_named(home: Path, tmp_path: Path) -> None:
    from roll_sft.engine.reader import Reader
    from roll_sft.errors import CheckpointError

    reader = Reader(home / "qwen2" / "megatron")
    reader.read("decoder.layers.0.mlp.linear_fc1.weight")
    with pytest.raises(CheckpointError, match=r"takes \d+ of them; the checkpoint belongs"):
        reader.check_all_read()


def test_a_checkpoint_of_a_newer_megatron_core_is_refused(tmp_path: Path) -> None:
    from roll_sft.engine.versions import check_megatron
    from roll_sft.errors import CheckpointError

    check_megatron(tmp_path, {"versions": {"megatron-core": "0.12.0"}})
    check_megatron(tmp_path, {"versions": {}})
    with pytest.raises(
        CheckpointError, match=r"written with megatron-core 99\.1\.0, which is newer"
    ):
        check_megatron(tmp_path, {"versions": {"megatron-core": "99.1.0"}})
