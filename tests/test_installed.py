"""An installed copy: what the wheel holds, and programs of users that run with it.

With --all-layouts (`make examples`) the examples run too, and the notebook.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbclient
import nbformat
import pytest

import roll_sft
from tests.doors import write_rows
from tests.parity import write_model
from tests.wheel import ROOT, built_wheel, unpacked_wheel
from tools import release_check

pytestmark = pytest.mark.slow

# What a program's process is like; what differs at the end is printed.
STATE = """
import logging, os, signal, sys, threading
def state():
    logs = [logging.getLogger(name) for name in ("", "roll_sft", "ray", "mlflow")]
    return dict(os.environ) | {
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook),
        "signals": [signal.getsignal(each) for each in sorted(signal.valid_signals())],
        "logs": [(each.handlers[:], each.level, each.propagate) for each in logs],
        "streams": (sys.stdout, sys.stderr, os.fstat(2).st_ino), "argv": sys.argv[:],
    }
BEFORE = state()
"""
CHECKS = """
import psutil, ray
after = state()
changed = [name for name in BEFORE.keys() | after if BEFORE.get(name) != after.get(name)]
family = [each.name() for each in psutil.Process().children(recursive=True)]
facts = {"changed": changed, "family": family, "ray": ray.is_initialized()}
"""
TELL = """
import json
print(json.dumps(facts | {"file": roll_sft.__file__}))
"""
IN_FOUND_RAY = """
import asyncio, ray
ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
import roll_sft
from roll_sft.base.errors import ConfigError
config = roll_sft.load_config("base").evolve(
    model={"path": "Qwen/Qwen2.5-0.5B"}, data={"sequence_length": 100},
    parallel={"device": "cpu"}, train={"max_steps": 2, "global_batch_size": 4},
    checkpoint={"hf_export": "none"}, tracking={"backends": ["jsonl"]},
)
pairs = [(f"Say {n}.", f"It is {n}.") for n in range(8)]
async def main():
    first = await asyncio.to_thread(roll_sft.train, pairs, config=config)
    second = roll_sft.train(pairs, config=config)
    try:
        roll_sft.train(pairs, config=config.evolve(parallel={"tensor_model_parallel_size": 2}))
    except ConfigError as error:
        return first, second, str(error)
first, second, refused = asyncio.run(main())
is_up = ray.get(ray.remote(lambda: 3).remote()) == 3
facts = {
    "folders": [str(first.folder), str(second.folder)], "losses": first.history["train_loss"],
    "again": second.history["train_loss"], "refused": refused, "is_up": is_up,
    "checkpoint": str(second.checkpoint),
}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A user's folder: a model under the name of the README's, and a file of rows."""
    model = write_model(tmp_path / "Qwen" / "Qwen2.5-0.5B", kind="qwen2-tied", num_layers=2)
    config = json.loads((model / "config.json").read_text())
    # As long as samples may be by default.
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    rows = [{"instruction": f"Say {number}.", "output": f"It is {number}."} for number in range(9)]
    write_rows(tmp_path / "my.jsonl", rows)
    return tmp_path


def environment(site: Path, place: Path) -> dict[str, str]:
    known = {"PYTHONPATH": str(site), "HOME": str(place), "RAY_AUTH_MODE": ""}
    known["RAY_TMPDIR"] = f"/tmp/r{os.getpid()}"  # sockets have short names
    kept = {name: each for name, each in os.environ.items() if name != "RAY_AUTH_MODE"}
    return kept | {name: each for name, each in known.items() if each}


def output_of(program: str, site: Path, place: Path, *arguments: str) -> list[str]:
    """The lines on stdout of a script, which has no `__main__` guard."""
    (place / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py", *arguments],
        cwd=place,
        env=environment(site, place),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_wheel_holds_what_a_user_needs_and_nothing_else(site: Path) -> None:
    packed = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    wanted = set(release_check.resources())
    assert {name for name in packed if ".dist-info/" not in name} == wanted
    beginnings = {name.partition("/")[2].partition("/")[0] for name in wanted}
    assert beginnings >= {"conf", "cluster", "constraints", "data", "report"}


@pytest.mark.long
def test_the_demo_runs_from_the_wheel_in_an_environment_of_its_own(tmp_path: Path) -> None:
    wheel = built_wheel(tmp_path / "wheel")
    place = tmp_path / "place"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    (packages,) = place.glob("lib/python3*/site-packages")
    # The dependencies are those of this environment; roll_sft itself is not on that path.
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    install = [sys.executable, "-m", "pip", "-qq", "--python", str(place / "bin" / "python")]
    subprocess.run([*install, "install", "--no-deps", str(wheel)], check=True)
    (place / "work").mkdir()

    def command(*words: str) -> str:
        known = {"HOME": str(place), "RAY_TMPDIR": f"/tmp/r{os.getpid()}"}
        done = subprocess.run(
            [str(place / "bin" / "roll-sft"), *words],
            cwd=place / "work",
            env={name: each for name, each in os.environ.items() if name != "PYTHONPATH"} | known,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert command("--version") == f"roll-sft {roll_sft.__version__}\n"
    assert "ok    pins: as in py3" in command("doctor", "--seconds", "0.2")
    command("train", "--config-name", "demo", "train.max_steps=3")
    assert (place / "work" / "outputs" / "demo" / "hf" / "model.safetensors").is_file()
    assert command("report", "outputs/demo")
    assert "recipes/" in command("completion", "bash")


@pytest.mark.long
def test_the_lines_of_the_readme_run_and_leave_the_process_as_it_was(
    site: Path, place: Path
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", readme, flags=re.M | re.S)
    assert len([line for line in code.splitlines() if line]) == 3
    *_, told, facts = output_of(f"{STATE}{code}{CHECKS}{TELL}", site, place)
    assert re.fullmatch(r"\[\d\.\d+\] \['.*'\]", told), told
    found = json.loads(facts)
    assert found["file"] == str(site / "roll_sft" / "__init__.py")
    assert (found["changed"], found["family"], found["ray"]) == ([], [], False)
    (folder,) = (place / "outputs").glob("sft_*")
    assert (folder / "hf" / "model.safetensors").is_file()


@pytest.mark.long
def test_a_found_ray_serves_a_thread_and_a_loop_and_stays(site: Path, place: Path) -> None:
    found = json.loads(output_of(f"{IN_FOUND_RAY}{TELL}", site, place)[-1])
    assert found["is_up"]
    assert len(found["losses"]) == 2
    assert found["again"] == found["losses"]  # the same call is the same run, which is finished
    assert len(set(found["folders"])) == 1
    assert found["checkpoint"] == f"{found['folders'][0]}/checkpoints/step_00000002"
    assert found["refused"].startswith("parallel: tensor_model_parallel_size 2 x ")


@pytest.fixture
def _all(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--all-layouts"):
        pytest.skip("the examples run by `make examples`")


@pytest.mark.usefixtures("_all")
def test_the_notebook_runs_and_shows_one_bar(
    site: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.read(ROOT / "examples" / "first_steps.ipynb", as_version=4)
    for name, value in environment(site, place).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("MODEL", "Qwen/Qwen2.5-0.5B")
    monkeypatch.setenv("STEPS", "4")
    client = nbclient.NotebookClient(
        notebook, timeout=280, resources={"metadata": {"path": str(place)}}
    )
    client.execute()
    (cell,) = [each for each in notebook.cells if "roll_sft.train(" in each.source]
    shown = [output for output in cell.outputs if output.output_type == "display_data"]
    bars = [output.data["text/html"] for output in shown if "<progress" in str(output.data)]
    assert len(bars) == 1
    assert 'value="4" max="4"' in bars[0]
    assert not [each for each in cell.outputs if "step 2/4" in each.get("text", "")]
    assert (place / "my_model" / "model.safetensors").is_file()


@pytest.mark.usefixtures("_all")
def test_full_stops_become_more_frequent(site: Path, place: Path) -> None:
    example = (ROOT / "examples" / "full_stops.py").read_text(encoding="utf-8")
    lines = output_of(example, site, place, "Qwen/Qwen2.5-0.5B")
    shares = [int(each) for each in re.findall(r"^step +\d+: +(\d+)% of", "\n".join(lines), re.M)]
    assert len(shares) == 8
    assert shares[0] < 50 < 90 < shares[-1]


@pytest.mark.usefixtures("_all")
def test_a_metric_with_references(site: Path, place: Path) -> None:
    example = (ROOT / "examples" / "custom_metric.py").read_text(encoding="utf-8")
    lines = output_of(example, site, place, "Qwen/Qwen2.5-0.5B")
    told = {line.split()[0]: line for line in lines[-3:]}
    assert told.keys() == {"right", "distance", "no_number"}
    assert len(re.findall(r"[\d.]+", told["right"])) == 2


@pytest.mark.usefixtures("_all")
def test_two_calls_each_with_a_ray_of_its_own(site: Path, place: Path) -> None:
    program = (
        IN_FOUND_RAY.split("async def")[0].replace("import asyncio, ray\nray.init(", "dict(")
        + """
import threading
first = roll_sft.train(pairs, config=config)
results = []
thread = threading.Thread(
    target=lambda: results.append(roll_sft.train(pairs[1:], config=config))
)
thread.start()
thread.join()
other = [first.folder != results[0].folder, len(results[0].history["train_loss"])]
from pathlib import Path
from roll_sft.base.errors import CheckpointError
from safetensors.torch import load_file, save_file
weights = Path("Qwen/Qwen2.5-0.5B/model.safetensors")
tensors = load_file(weights)
tensors["model.norm.weight"] = tensors["model.norm.weight"] / 0
save_file(tensors, weights, metadata={"format": "pt"})
try:  # an error of a worker, when Ray has been started
    roll_sft.train(pairs[2:], config=config)
except CheckpointError as error:
    other.append("model.norm.weight" in str(error))
"""
    )
    tell = f'{CHECKS}facts["other"] = other\n{TELL}'
    found = json.loads(output_of(f"{STATE}{program}{tell}", site, place)[-1])
    assert (found["changed"], found["family"], found["ray"]) == ([], [], False)
    assert found["other"] == [True, 2, True]
