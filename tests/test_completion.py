"""What bash completes after the script of `roll-sft completion bash`."""

import subprocess

import pytest

from roll_sft import cli


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("roll-sft", "conv"), "convert"),
        (("roll-sft", "train", "train.learning_ra"), "train.learning_rate="),
        (("roll-sft", "train", "--config-name", "recipes/tulu"), "recipes/tulu3_8b_sft"),
        (("roll-sft", "train", "--config-n"), "--config-name"),
    ],
)
def test_bash_completes(
    words: tuple[str, ...], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    line = " ".join(f"'{word}'" for word in words)
    script += f"\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _roll_sft"
    script += '\nprintf "%s\\n" "${COMPREPLY[@]}"'
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.split()[:1] == [wanted]
    assert not shown.stderr


def test_a_shell_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "fish"]) == 2
    assert "bash" in capsys.readouterr().err
