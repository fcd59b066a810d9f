"""docs/cli.md: the help of every command, as its parser prints it.

`python tools/cli_reference.py > docs/cli.md` writes the page.
"""

import contextlib
import io
import os
import sys
from unittest.mock import patch

from roll_sft import cli

_INTRODUCTION = """\
# Command line

Each command's own help, as `roll-sft COMMAND --help` prints it. `roll-sft --help` lists the
commands, `roll-sft --version` prints the version, and `eval "$(roll-sft completion bash)"`
completes commands, keys and configurations in bash; zsh likewise. [Files and exit
codes](files.md#exit-codes) says what a command ends with.

The arguments of a run are `--config-name NAME`, `--config-dir FOLDER` and any number of
`key=value`, of the keys in [Configuration](configuration.md). `--config-dir` adds your own YAML,
which can start from ours with `defaults: [base, _self_]`. `--cfg job` prints what was composed,
and ends.
"""
_WIDTH = 100  # columns


def page() -> str:
    """docs/cli.md."""
    return "\n".join([_INTRODUCTION, *map(_section, cli.COMMANDS)])


def _section(name: str) -> str:
    shown = io.StringIO()
    with patch.dict(os.environ, {"COLUMNS": str(_WIDTH)}), contextlib.redirect_stdout(shown):
        code = cli.main([name, "--help"])
    assert code == 0, f"roll-sft {name} --help ended with {code}"
    text = shown.getvalue()
    if name == "train":  # every key of a configuration follows, which docs/configuration.md has
        text = text.partition("\n\n")[0]
    return f"## roll-sft {name}\n\n```text\n{text.rstrip()}\n```\n"


if __name__ == "__main__":
    sys.stdout.write(page())
