"""`roll-sft COMMAND ...`: the console script, one word for each thing that can be done."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from roll_sft import __version__
from roll_sft.base.errors import ConfigError, RollSftError, report
from roll_sft.base.text import printable
from roll_sft.config.schema import RunConfig

USAGE_ERROR = ConfigError.exit_code
CONFIGURATION = (
    "Every other argument is one of `roll-sft train`: --config-name NAME, --config-dir"
    " FOLDER, key=value, --cfg job. Exit codes: 0 done, 2 configuration, 3 data,"
    " 4 resources, 5 diverged, 6 checkpoint, 7 workers, 75 stopped and goes on"
)
USAGE = "usage: roll-sft COMMAND [arguments]; roll-sft COMMAND --help says more"
EXAMPLES = """\
Try it, on a CPU and without a download:
  roll-sft train --config-name demo
Train your model on your data, after a look at the plan:
  roll-sft plan  model.path=MODEL 'data.train=[{path: FILE.jsonl}]'
  roll-sft train model.path=MODEL 'data.train=[{path: FILE.jsonl}]'
roll-sft --version prints the version.
"""


@dataclass(frozen=True, slots=True)
class Command:
    """What a word does: `main` takes the arguments after it and returns the exit code."""

    summary: str
    main: Callable[[list[str]], int]


def main(arguments: list[str] | None = None) -> int:
    """Run `arguments` (default: the command line's) and return the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    if given and given[0] in ("-V", "--version"):
        sys.stdout.write(f"roll-sft {__version__}\n")
        return 0
    if not given or given[0] not in COMMANDS:
        sys.stderr.write(f"{printable(_refusal(given))}\n")
        return USAGE_ERROR
    try:
        return COMMANDS[given[0]].main(given[1:])
    except SystemExit as leaving:  # argparse has shown help, or said what is wrong
        return leaving.code if isinstance(leaving.code, int) else USAGE_ERROR


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([USAGE, "", *lines, "", EXAMPLES])


def _refusal(given: list[str]) -> str:
    names = ", ".join(COMMANDS)
    if not given:
        return f"roll-sft: no command; there are {names}"
    nearest = difflib.get_close_matches(given[0], COMMANDS, n=1, cutoff=0.5)
    if given[0].startswith("-") or "=" in given[0]:  # the arguments of a run
        nearest = ["train"]
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"roll-sft: there is no command {given[0]!r}; {hint}there are {names}"


def _train(arguments: list[str]) -> int:
    from roll_sft import run

    return run.main(arguments)


def _plan(arguments: list[str]) -> int:
    parser = _parser("plan", "")
    parser.add_argument(
        "--suggest", action="store_true", help="layouts for --gpus GPUs of --memory GiB each"
    )
    parser.add_argument("--gpus", type=_count, metavar="N", help="in all")
    parser.add_argument("--memory", type=_gib, metavar="GIB", help="of a GPU, such as 80")
    parser.add_argument("--gpus-per-node", type=_count, metavar="N", help="default: 8")
    options, rest = parser.parse_known_args(arguments)
    needed, node = (options.gpus, options.memory), options.gpus_per_node
    if options.suggest and None in needed:
        parser.error("--suggest: needs --gpus N and --memory GIB")
    if not options.suggest and any(each is not None for each in (*needed, node)):
        parser.error("--gpus, --gpus-per-node and --memory: only with --suggest; add it")
    if not options.suggest:
        return _run_with("dry_run=true", "plan", arguments)
    from roll_sft import run

    def action(config: RunConfig, _composed_yaml: str) -> None:
        from roll_sft.job.layouts import Gpus
        from roll_sft.job.suggest import show_suggestions

        show_suggestions(config, Gpus(options.gpus, options.memory, node or 8))

    return run.main(rest, action=action)


def _prepare(arguments: list[str]) -> int:
    return _run_with("prepare_only=true", "prepare", arguments)


def _run_with(override: str, name: str, arguments: list[str]) -> int:
    from roll_sft import run

    _, rest = _parser(name, "").parse_known_args(arguments)
    return run.main([*rest, override])


def _parity(arguments: list[str]) -> int:
    from roll_sft import run

    parser = _parser("parity", "; 1: what is computed differs, and the last line names where")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="of the first batch; default: 8 at most"
    )
    options, rest = parser.parse_known_args(arguments)

    def action(config: RunConfig, _composed_yaml: str) -> None:
        # Heavy imports after composition, so that a typo is reported in half a second.
        from roll_sft.parity import command

        command.run(config, samples=options.samples)

    return run.main(rest, action=action)


def _rehearse(arguments: list[str]) -> int:
    from roll_sft import run

    _, rest = _parser("rehearse", "").parse_known_args(arguments)

    def action(config: RunConfig, _composed_yaml: str) -> None:
        from roll_sft.rehearsal import command

        command.run(config)

    return run.main(rest, action=action)


def _preview(arguments: list[str]) -> int:
    from roll_sft import run

    parser = _parser("preview", "")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--index",
        type=_rows,
        default=(),
        metavar="N,...",
        help="rows of each source, from 0; default: the first few",
    )
    which.add_argument("--longest", type=_count, metavar="N", help="the samples of most tokens")
    which.add_argument(
        "--dropped", action="store_true", help="rows that are not trained on, with the reason"
    )
    parser.add_argument("--source", metavar="NAME", help="of one source alone")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="as a page, instead of in the terminal"
    )
    options, rest = parser.parse_known_args(arguments)

    def action(config: RunConfig, _composed_yaml: str) -> None:
        from roll_sft.preview import command

        choice = command.Choice(
            source=options.source,
            rows=options.index,
            longest=options.longest,
            dropped=options.dropped,
        )
        command.run(config, choice, page=options.html)

    return run.main(rest, action=action)


def _report(arguments: list[str]) -> int:
    from roll_sft.report import command

    return command.main(arguments)


def _watch(arguments: list[str]) -> int:
    from roll_sft.report import watch

    return watch.main(arguments)


def _convert(arguments: list[str]) -> int:
    from roll_sft.convert import command

    return command.main(arguments, program="roll-sft convert")


def _merge_lora(arguments: list[str]) -> int:
    from roll_sft.convert import merge_lora

    return merge_lora.main(arguments, program="roll-sft merge-lora")


def _chat(arguments: list[str]) -> int:
    from roll_sft.chat import command

    return command.chat(arguments)


def _generate(arguments: list[str]) -> int:
    from roll_sft.chat import command

    return command.generate(arguments)


def _sync(arguments: list[str]) -> int:
    from roll_sft.run import be_quiet

    be_quiet()
    from roll_sft.tracking import sync

    return sync.main(arguments, program="roll-sft sync")


def _completion(arguments: list[str]) -> int:
    from roll_sft import completion
    from roll_sft.run import shipped_configurations

    parser = argparse.ArgumentParser(
        prog="roll-sft completion",
        description='In ~/.bashrc: eval "$(roll-sft completion bash)"; zsh likewise.',
    )
    parser.add_argument("shell", choices=completion.SHELLS)
    shell = parser.parse_args(arguments).shell
    found = shipped_configurations()
    sys.stdout.write(completion.script(shell, commands=COMMANDS, configurations=found))
    return 0


def _doctor(arguments: list[str]) -> int:
    from roll_sft import run
    from roll_sft.doctor import command

    parser = _parser("doctor", "")
    command.add_options(parser)
    options, rest = parser.parse_known_args(arguments)

    def action(config: RunConfig, _composed_yaml: str) -> None:
        command.run(config, as_json=options.json, seconds=options.seconds)

    if rest:
        return run.main(rest, action=action)
    run.be_quiet()
    try:  # no configuration: what every run needs
        action(RunConfig(), "")
    except RollSftError as error:
        return report(error)
    return 0


def _submit(arguments: list[str]) -> int:
    from roll_sft import run
    from roll_sft.submit import command

    run.be_quiet()
    return command.main(arguments, compose=run.compose)


def _cluster_files(arguments: list[str]) -> int:
    from roll_sft.submit import cluster_files

    return cluster_files.main(arguments)


def _import_config(arguments: list[str]) -> int:
    from roll_sft.migrate import command

    return command.main(arguments, program="roll-sft import-config")


def _push(arguments: list[str]) -> int:
    from roll_sft.run import be_quiet

    be_quiet()
    from roll_sft.convert import push

    return push.main(arguments, program="roll-sft push")


def _rows(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers of rows, from 0, such as 3,17")
    return tuple(map(int, text.split(",")))


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _gib(text: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or not 0 < float(text) < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GiB, such as 80")
    return float(text)


def _parser(name: str, exit_codes: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"roll-sft {name}",
        description=COMMANDS[name].summary,
        epilog=f"{CONFIGURATION}{exit_codes}.",
        allow_abbrev=False,
    )


COMMANDS = {
    "train": Command("fine-tune a model", _train),
    "plan": Command("what a run would do, without starting it", _plan),
    "prepare": Command("the data of a run made ready, as training finds it", _prepare),
    "preview": Command("rows as they are trained on, token by token", _preview),
    "report": Command("a page about a run, or several beside each other", _report),
    "watch": Command("a run as it goes, from its files", _watch),
    "parity": Command("the first batch of a run, computed by it and by transformers", _parity),
    "convert": Command("a checkpoint to a folder that transformers loads, or back", _convert),
    "merge-lora": Command("an adapter merged into its base model", _merge_lora),
    "chat": Command("talk to a model, or to the model of a run", _chat),
    "generate": Command("its answers to a file of prompts", _generate),
    "push": Command("the exported model of a run to a repository of the hub", _push),
    "sync": Command("points of a run sent to trackers that missed them", _sync),
    "rehearse": Command("faults in tiny runs on the layout of yours, and what follows", _rehearse),
    "doctor": Command("whether this machine, a cluster and a configuration are fit", _doctor),
    "submit": Command("a run as a job of a Ray cluster; its status, logs and stop", _submit),
    "cluster-files": Command("files for SLURM, Kubernetes, Ray's launcher, images", _cluster_files),
    "completion": Command("a script for bash or zsh that completes keys", _completion),
    "import-config": Command("another trainer's configuration into ours", _import_config),
}


if __name__ == "__main__":
    sys.exit(main())
