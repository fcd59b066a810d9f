"""`roll-sft completion SHELL`: a script that completes commands, keys and configurations.

eval "$(roll-sft completion bash)"      in ~/.bashrc
eval "$(roll-sft completion zsh)"       in ~/.zshrc
"""

from collections.abc import Iterable
from pathlib import Path
from string import Template

from roll_sft.config.fields import all_keys
from roll_sft.config.schema import RunConfig

SHELLS = ("bash", "zsh")
# Commands that take the arguments of a run.
_RUNS = ("train", "plan", "prepare", "preview", "parity", "doctor", "rehearse", "submit")
_OF_BASH = Template("""\
_roll_sft() {
  local word="$${COMP_WORDS[COMP_CWORD]}" before="$${COMP_WORDS[COMP_CWORD-1]}"
  COMPREPLY=()
  if [ "$$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($$(compgen -W "$commands" -- "$$word"))
  elif [[ " $runs " == *" $${COMP_WORDS[1]} "* && "$$word" != *=* && "$$before" != "=" ]]; then
    if [ "$$before" = --config-name ]; then
      COMPREPLY=($$(compgen -W "$configurations" -- "$$word"))
    else
      COMPREPLY=($$(compgen -W "$keys --config-name --config-dir" -- "$$word"))
      if [[ "$${COMPREPLY[*]}" == *= ]]; then compopt -o nospace 2>/dev/null; fi
    fi
  fi
}
complete -o default -F _roll_sft roll-sft
""")
# zsh runs bash's functions.
_BEFORE_IN_ZSH = (
    "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
)


def script(shell: str, *, commands: Iterable[str], configurations: Path) -> str:
    """The script for `shell`, one of SHELLS; `configurations` is the folder of the shipped ones."""
    files = [*configurations.glob("*.yaml"), *configurations.glob("recipes/*.yaml")]
    keys = sorted(f"{key.name}=" for key in all_keys(RunConfig))
    text = _OF_BASH.substitute(
        commands=" ".join(commands),
        runs=" ".join(_RUNS),
        configurations=" ".join(
            sorted(path.relative_to(configurations).with_suffix("").as_posix() for path in files)
        ),
        keys=" ".join(
            key for key in keys if not key.startswith(("data.train.", "data.validation."))
        ),
    )
    return (_BEFORE_IN_ZSH if shell == "zsh" else "") + text
