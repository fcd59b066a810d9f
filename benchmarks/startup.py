"""From the command to the first optimizer step, tokens cached, two workers on this machine.

    python benchmarks/startup.py

The command is started as a user does, in a new process, on the demo's model. `parts_s` is what the
run itself says of where the time went; the step's own time is in its line.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from shared import measures

from roll_sft.demo.demo import make_assets

GOAL = "<= 8"
PACKAGES = ("ray", "torch", "megatron-core", "transformers")
LINE = re.compile(r"begins ([\d.]+) s after the command: (.*)")
STEP = re.compile(r"step 1/1 .*?([\d.]+) s\b")


def main() -> None:
    """Measures and prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=measures.pairs(5))
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_assets(folder)
        _run(folder, 0)  # fills the token cache
        timed = [_run(folder, number) for number in range(1, runs + 1)]
    parts = [dict(part.rsplit(" ", 1) for part in text.split(", ")) for _, text in timed]
    middle = {name: sorted(float(one[name]) for one in parts)[len(parts) // 2] for name in parts[0]}
    measures.show(
        "startup_seconds",
        [seconds for seconds, _ in timed],
        goal=GOAL,
        denominator="one second; wall time of this machine",
        packages=PACKAGES,
        parts_s=middle,
    )


def _run(folder: Path, number: int) -> tuple[float, str]:
    """Seconds to the end of the first step, and where they went."""
    command = [sys.executable, "-m", "roll_sft.run", "--config-name=demo"]
    command += [
        f"model.path={folder}/model",
        f"data.train=[{{path: {folder}/train.jsonl}}]",
        "data.validation=[]",
        f"data.cache_dir={folder}/cache",
        f"output_dir={folder}/run_{number}",
        "train.max_steps=1",
        "checkpoint.save=false",
        "checkpoint.hf_export=none",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "400"}
    )
    text = done.stdout + done.stderr
    begins, step = LINE.search(text), STEP.search(text)
    assert begins, text
    assert step, text
    return float(begins[1]) + float(step[1]), begins[2]


if __name__ == "__main__":
    main()
