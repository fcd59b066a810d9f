"""The command lines of `roll-sft chat` and `roll-sft generate`."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roll_sft.base.errors import ConfigError, report
from roll_sft.base.files import write_durably, writing

if TYPE_CHECKING:  # torch and transformers take seconds to import
    from roll_sft.chat.prompts import Asked
    from roll_sft.chat.speaker import Prompt, Sampling, Speaker


def chat(arguments: list[str]) -> int:
    """`roll-sft chat`; returns the exit code, the cause as the last line on stderr."""
    parser = _parser("chat", "Talk to a model. Lines that are piped in are answered one by one.")
    options = parser.parse_args(arguments)
    return main(options, _chat)


def generate(arguments: list[str]) -> int:
    """`roll-sft generate`; returns the exit code, the cause as the last line on stderr."""
    parser = _parser("generate", "The answers of a model to the prompts of a file, as JSON lines.")
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help=".jsonl or .json of texts, messages or rows of training data; else a text a line",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines of {index, prompt, output, num_tokens, finish}, with a row's reference",
    )
    parser.add_argument(
        "--batch-size", type=_whole(1), default=16, metavar="N", help="prompts at a time; 16"
    )
    parser.add_argument(
        "--plain", action="store_true", help="continue each text as it is, without a chat template"
    )
    parser.add_argument("--replace", action="store_true", help="replace an earlier output")
    options = parser.parse_args(arguments)
    return main(options, _generate)


def main(options: argparse.Namespace, work: Callable[[argparse.Namespace], None]) -> int:
    """Do `work` with the parsed `options`; returns the exit code."""
    try:
        work(options)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 -- the door: everything ends in an exit code
        return report(error)
    return 0


def _chat(options: argparse.Namespace) -> None:
    from roll_sft.chat.conversation import converse
    from roll_sft.chat.places import find_model

    place = find_model(options.model, base=options.base)
    # Heavy imports once the folder is known to be there.
    from roll_sft.chat.speaker import Speaker

    speaker = Speaker(place)
    if not speaker.has_template:
        raise ConfigError(
            f"{options.model}: its tokenizer has no chat template to hold a conversation with;"
            " `roll-sft generate --plain` continues texts"
        )
    converse(speaker, _sampling(options), system=options.system)


def _generate(options: argparse.Namespace) -> None:
    from roll_sft.chat.places import find_model
    from roll_sft.chat.prompts import read_prompts

    output: Path = options.output
    if output.exists() and not options.replace:
        raise ConfigError(f"--output: {output} is there already; add --replace, or name another")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output: there is no folder {output.absolute().parent}; make it first")
    prompts = read_prompts(options.prompts)
    place = find_model(options.model, base=options.base)
    from roll_sft.chat.speaker import Speaker

    lines = answer_lines(
        Speaker(place),
        prompts,
        _sampling(options),
        system=options.system,
        is_plain=options.plain,
        batch_size=options.batch_size,
    )
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with writing(output):
        write_durably(output, text.encode("utf-8", "backslashreplace"))
    sys.stdout.write(f"{output}\n")


def answer_lines(
    speaker: "Speaker",
    prompts: "Sequence[Asked]",
    sampling: "Sampling",
    *,
    system: str | None = None,
    is_plain: bool = False,
    batch_size: int = 16,
) -> list[dict[str, Any]]:
    """One record for each of `prompts`, in their order: index, prompt, output, num_tokens, finish.

    `prompts` are of `prompts.read_prompts`. Every prompt is checked before the first is answered.
    Raises `DataError` for one that cannot be used.
    """
    ids = [
        speaker.prompt_ids(_question(each, system=system, is_plain=is_plain), where=each.where)
        for each in prompts
    ]
    found = dict(speaker.answers(ids, sampling, batch_size=batch_size))
    lines = []
    for index, each in enumerate(prompts):
        answer = found[index]
        line = {"index": index, "prompt": each.prompt, "output": answer.text}
        if each.reference is not None:
            line["reference"] = each.reference
        lines.append({**line, "num_tokens": answer.num_tokens, "finish": answer.finish})
    return lines


def _question(each: "Asked", *, system: str | None, is_plain: bool) -> "Prompt":
    if is_plain:
        return str(each.messages[-1]["content"])
    has_system = each.messages[0]["role"] == "system"
    if system and not has_system:
        return [{"role": "system", "content": system}, *each.messages]
    return each.messages


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    """The arguments that both commands take."""
    parser = argparse.ArgumentParser(
        prog=f"roll-sft {name}", description=description, allow_abbrev=False
    )
    parser.add_argument(
        "model",
        metavar="MODEL_OR_RUN",
        help="folder of a model, an adapter or a run, or a hub id",
    )
    parser.add_argument("--base", metavar="MODEL", help="base model of an adapter, if it was moved")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--max-new-tokens",
        type=_whole(1),
        default=256,
        metavar="N",
        help="of an answer at most; 256",
    )
    parser.add_argument(
        "--temperature",
        type=_number(100),
        default=0.0,
        metavar="T",
        help="0, the default, takes the most likely token; above 0 tokens are drawn",
    )
    parser.add_argument(
        "--top-p",
        type=_number(1, is_above=True),
        default=1.0,
        metavar="P",
        help="draw from the tokens of this share; 1",
    )
    parser.add_argument(
        "--top-k", type=_whole(0), default=0, metavar="K", help="draw from so many tokens; 0: all"
    )
    parser.add_argument("--seed", type=_whole(0), default=42, metavar="N", help="of drawing; 42")
    return parser


def _sampling(options: argparse.Namespace) -> "Sampling":
    from roll_sft.chat.speaker import Sampling

    return Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )


def _whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
        return int(text)

    return whole


def _number(most: float, *, is_above: bool = False) -> Callable[[str], float]:
    def number(text: str) -> float:
        is_number = re.fullmatch(r"[0-9]*\.?[0-9]+", text)
        if not is_number or float(text) > most or (is_above and float(text) == 0):
            low = "above 0" if is_above else "from 0"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {low} to {most:g}")
        return float(text)

    return number
