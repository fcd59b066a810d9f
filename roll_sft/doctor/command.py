"""`roll-sft doctor`: whether a run would find what it needs, before it is started."""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from rich.text import Text

from roll_sft.base.console import stdout_console
from roll_sft.base.errors import ResourceError, RollSftError
from roll_sft.config.schema import RunConfig, cluster_address, token_cache_folder
from roll_sft.doctor.finding import Finding, worst
from roll_sft.doctor.machine import look_at_machine
from roll_sft.doctor.nodes import look_at_nodes
from roll_sft.doctor.packages import look_at_packages
from roll_sft.training.run_folder import output_folder

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_DEVICES_TIMEOUT_S = 120.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command line; all other arguments are those of a run."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="of the devices' measurement"
    )


def run(config: RunConfig, *, as_json: bool, seconds: float) -> None:
    """Look at everything and show it. Raises `ResourceError` if something fails."""
    findings = []
    for finding in look(config, seconds=seconds):
        findings.append(finding)
        if not as_json:
            _show(finding)
    if as_json:
        lines = [dataclasses.asdict(each) for each in findings]
        sys.stdout.write(json.dumps({"verdict": worst(findings), "findings": lines}) + "\n")
    failed = [each.name for each in findings if each.verdict == "fail"]
    if failed:
        raise ResourceError(f"doctor: {', '.join(failed)} must be mended before a run")


def look(config: RunConfig, *, seconds: float) -> Iterator[Finding]:
    """Every finding, the quick ones first."""
    yield from look_at_packages()
    places = {
        "output_dir": output_folder(config).absolute(),
        "data.cache_dir": token_cache_folder(config).absolute(),
    }
    yield from look_at_machine(places)
    if config.model.path is not None and config.data.train:
        yield _sample(config)
    if cluster_address(config) is None:
        yield Finding("ports", "ok", "a run here listens on 127.0.0.1 alone")
        yield from look_at_nodes([_devices(seconds)])
        return
    from roll_sft.runtime.survey import survey

    try:
        nodes = survey(config, places, seconds=seconds)
    except RollSftError as error:
        yield Finding("Ray cluster", "fail", str(error), "see `ray status` on its head")
        return
    text = f"{cluster_address(config)} answers; nodes: {len(nodes)}"
    yield Finding("Ray cluster", "ok", text)
    yield from look_at_nodes(nodes)


def _devices(seconds: float) -> dict[str, Any]:
    """The devices of this machine, measured in a process of its own."""
    command = [sys.executable, "-m", "roll_sft.doctor.devices", "--seconds", str(seconds)]
    try:
        shown = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_DEVICES_TIMEOUT_S + seconds,
            check=True,
        )
    except subprocess.TimeoutExpired:
        return {"host": "this machine", "error": "the devices did not answer"}
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()[-1:]
        return {"host": "this machine", "error": said[0] if said else "the measurement ended"}
    found: dict[str, Any] = json.loads(shown.stdout)
    return {"host": "this machine", **found}


def _sample(config: RunConfig) -> Finding:
    """The first sample of the data: tokens, and what is trained on."""
    from roll_sft.preview.command import reader_of
    from roll_sft.preview.rows import Choice, look

    try:
        preview = look(reader_of(config), Choice(rows=(0,)))
    except RollSftError as error:
        return Finding("first sample", "fail", str(error).splitlines()[0], "roll-sft preview")
    if not preview.shown:
        why = preview.dropped[0].reason if preview.dropped else "no row"
        return Finding("first sample", "warn", f"dropped: {why}", "roll-sft preview --dropped")
    first = preview.shown[0]
    learnt = "".join(piece.text for piece in first.pieces if piece.is_supervised)
    text = f"{first.num_tokens} tokens, {first.num_supervised} supervised: {learnt[:60]!r}"
    if not first.num_supervised:
        return Finding("first sample", "fail", text, "roll-sft preview shows what is trained on")
    return Finding("first sample", "ok", text)


def _show(finding: Finding) -> None:
    line = Text(f"{finding.verdict:<4}", style=_STYLES[finding.verdict])
    line.append(f"  {finding.name}: {finding.found}", style="not bold default")
    if finding.remedy:
        line.append(f"; {finding.remedy}", style="dim")
    stdout_console().print(line, soft_wrap=True)
