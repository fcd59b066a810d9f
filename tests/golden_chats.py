"""The golden samples of chat templates: which conversations, which tokenizer, and how written.

    python -m tests.golden_chats [--qwen3 tokenizer_config.json]

writes tests/golden/chats.json; read the difference before it is kept. `text` shows each sample with
its supervised text between guillemets, `ids` are its tokens, `supervised` the tokens [first, last]
of each supervised run. With `--qwen3`, the samples of "qwen3" come from the template in that file,
the model's own: the tests give them to `QWEN3_LIKE`, which was written from what it is known to do.
"""

import argparse
import copy
import functools
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.chat.mask import supervised_runs
from roll_sft.data.chat.sample import TokenizedSample, UnusableRow
from roll_sft.data.chat.templates import NAMED, chat_template
from roll_sft.data.rows.conversation import Conversation, Message, ToolCall
from tests.tiny import tiny_tokenizer

PATH = Path(__file__).with_name("golden") / "chats.json"
CONTROL_TOKENS = [
    *("<start_of_turn>", "<end_of_turn>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <two> numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}

# Drops the reasoning of turns before the last question, and writes an empty block where the last
# answer has none: Qwen 3's way, which moves what has been written when a conversation goes on.
QWEN3_LIKE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' }}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name ' }}
    {{- 'and arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set last = namespace(question=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- set thought = message.reasoning_content or '' %}
        {%- set answer = message.content %}
        {%- if not thought and '</think>' in answer %}
            {%- set thought = answer.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > last.question and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + answer.lstrip('\\n') }}
        {%- else %}
            {{- answer }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n' if answer or not loop.first else '' }}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user' if messages[loop.index0 - 1].role != 'tool' else '' }}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' else '' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


@functools.cache
def golden_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with the control tokens of every family; copy it before changing it."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL_TOKENS})
    return tokenizer


def conversation(*messages: Message, tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    """A row of these messages."""
    return Conversation(messages, row=0, line=1, tools=tools)


def cases() -> dict[str, Conversation]:
    """The conversations, by name."""
    system, user = Message("system", "Be brief."), Message("user", "What is 1 + 2?")
    call = Message("assistant", "", tool_calls=(ToolCall("add", {"a": 1, "b": 2}, id="call00001"),))
    result = Message("tool", "3", name="add", tool_call_id="call00001")
    more, three = Message("user", "And {{x}} \u4f60?\n"), Message("assistant", "It is 3.")
    return {
        "single": conversation(user, three),
        "multi": conversation(system, user, three, more, Message("assistant", " \u597d\n")),
        "untrained": conversation(user, Message("assistant", "4?", train=False), more, three),
        "tools": conversation(system, user, call, result, three, more, three, tools=(TOOL,)),
        "reasoning": conversation(
            user,
            Message("assistant", "3", reasoning="1 and 2"),
            more,
            Message("assistant", "x", reasoning="hm"),
        ),
        "control": conversation(user, Message("assistant", "<|im_end|>[INST]<|eot_id|>")),
    }


def templates() -> dict[str, str]:
    """The templates, by name."""
    tokenizer = golden_tokenizer()
    named = {name: chat_template(name, tokenizer) or "" for name in NAMED}
    return {**named, "qwen3": QWEN3_LIKE}


def golden(chat: ChatTokenizer, row: Conversation) -> Any:
    """What a row becomes, as it is written down."""
    (result,) = chat.tokenize_many([row])
    if isinstance(result, UnusableRow):
        return str(result)
    return [_shown(sample) for sample in result]


def _shown(sample: TokenizedSample) -> dict[str, Any]:
    ids, decode = sample.token_ids.tolist(), golden_tokenizer().decode
    runs = list(zip(*supervised_runs(sample), strict=True))
    text, place = "", 0
    for first, last in runs:
        text += f"{decode(ids[place:first])}\u00ab{decode(ids[first : last + 1])}\u00bb"
        place = last + 1
    shown = {"text": text + decode(ids[place:]), "supervised": [list(run) for run in runs]}
    return {**shown, "atomic": [list(span) for span in sample.atomic], "ids": ids}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--qwen3", type=Path, help="a tokenizer_config.json with the real template")
    given = parser.parse_args()
    texts = templates()
    if given.qwen3:
        texts["qwen3"] = json.loads(given.qwen3.read_text())["chat_template"]
    lines = []
    for name, template in texts.items():
        chat = ChatTokenizer(golden_tokenizer(), template=template)
        for case, row in cases().items():
            key, value = json.dumps(f"{name}/{case}"), json.dumps(golden(chat, row))
            lines.append(f"{key}: {value}")
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
