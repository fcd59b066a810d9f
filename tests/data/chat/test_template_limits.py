"""A chat template of any kind ends: with the text of transformers, or with a reason."""

import json

import pytest
from transformers.utils import chat_template_utils

from roll_sft.base.errors import DataError
from roll_sft.data.chat import template_limits
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.chat.render import Renderer
from roll_sft.data.chat.sample import UnusableRow
from roll_sft.data.chat.template_limits import compile_bounded
from roll_sft.data.chat.templates import variables_of
from roll_sft.data.rows.conversation import Conversation, Message, ToolCall
from tests.golden_chats import TOOL, cases, golden_tokenizer, templates
from tests.tiny import CHATML_TEMPLATE

BOMBS = {
    "loops in loops": "{% for a in range(9999) %}{% for b in range(999) %}{% endfor %}{% endfor %}",
    "loops that join": "{% for a in 'x' * 9999 %}{{ messages | tojson * 999 }}{% endfor %}",
    "a range too long": "{{ range(10 ** 9) | list }}",
    "a text too long": "{{ 'x' * 10 ** 12 }}",
    "a list too long": "{{ ([0] * 10 ** 12) | length }}",
    "a number too long": "{{ 9 ** (9 ** 9) }}",
    "a text that doubles": (
        "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
        "{% endfor %}{{ ns.x }}"
    ),
    "a list that doubles": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}"
        "{% endfor %}{{ ns.x | length }}"
    ),
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macros that multiply": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "macros that double": (
        "{% macro f(n, x) %}{% if n %}{{ f(n - 1, x ~ x) }}{% endif %}{% endmacro %}"
        "{{ f(99, 'x') }}"
    ),
    "loops that recur": (
        "{% for a in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}"
        "{% endfor %}"
    ),
    "much text in a loop": "{% for a in range(9999) %}{{ 'x' * 99999 }}{% endfor %}",
    "words without end": "{{ lipsum(n=10 ** 9) }}",
    "a number padded": "{{ '%1000000000d' % 1 }}",
    "a number with digits": "{{ '%.1000000000f' % 1.5 }}",
    "a width that is given": "{{ '%*d' % (10 ** 9, 1) }}",
    "a text centred": "{{ 'x'.center(10 ** 9) }}",
    "a text centred by a filter": "{{ messages[0].content | center(1000000000) }}",
    "a text filled": "{{ 'x'.zfill(10 ** 9) }}",
    "a format": "{{ '{:1000000000d}'.format(1) }}",
    "a format with a given width": "{{ '{:{w}}'.format(1, w=10 ** 9) }}",
    "a format by a filter": "{{ '%1000000000s' | format('x') }}",
    "lines indented": "{{ 'x\n' | indent(1000000000) }}",
    "entries made up": "{{ [1] | batch(1000000000, 'x') | list }}",
    "slices": "{{ [1] | slice(1000000000) | list }}",
    "tabs": "{{ '\t'.expandtabs(10 ** 9) }}",
    "texts replaced": "{{ 'x'" + " | replace('x', 'xxxxxxxx')" * 99 + " }}",
    "texts replaced by a method": "{{ 'x'" + ".replace('x', 'xxxxxxxx')" * 99 + " }}",
    "entries joined": "{{ 'xxx'" + " | list | join('xxxxxxxx')" * 99 + " }}",
    "entries joined by a method": "{% set x = 'x' * 9999 %}{{ x.join(x) * 9 }}",
    "JSON of JSON": "{{ '\"'" + " | tojson" * 99 + " }}",
    "names that double": "{% set x = 'x' %}" + "{% set x = x ~ x %}" * 99 + "{{ x }}",
    "JSON that is named": "{% set x = '\"' %}" + "{% set x = x | tojson %}" * 99 + "{{ x }}",
    "blocks that double": "{% set x = 'x' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 99,
    "lists in lists": "{% set x = ['x'] %}" + "{% set x = [x, x] %}" * 40 + "{{ x }}",
    "lists in lists of a loop": (
        "{% set ns = namespace(x=['x']) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% endfor %}{{ ns.x | tojson }}"
    ),
    "tuples in tuples": "{% set x = ('x',) %}" + "{% set x = (x, x) %}" * 40 + "{{ {x: 1} }}",
    "objects in objects": "{% set x = 1 %}" + "{% set x = {'a': x, 'b': x} %}" * 40 + "{{ x ~ 1 }}",
    "objects that are called": "{% set x = 1 %}" + "{% set x = dict(a=x, b=x) %}" * 40 + "{{ x }}",
    "namespaces": "{% set x = 1 %}" + "{% set x = namespace(a=x, b=x) %}" * 40 + "{{ x }}",
    "lists that are multiplied": "{% set x = [1] %}" + "{% set x = [x] * 2 %}" * 40 + "{{ x }}",
    "lists in batches": (
        "{% set x = [1, 1] %}" + "{% set x = (x + x) | batch(2) | list %}" * 60 + "{{ x }}"
    ),
    "lists of a loop in a loop": (
        "{% set x = [1] %}"
        + "{% for x in [[x, x, x, x, x, x, x, x]] %}" * 15
        + "{{ x }}"
        + "{% endfor %}" * 15
    ),
    "lists in one expression": "{% set x = [0] * 10 ** 6 %}{{ [" + "x, " * 999 + "] | string }}",
    "texts in a with": (
        "{% set x = 'x' %}" + "{% with x = x ~ x %}" * 40 + "{{ x }}" + "{% endwith %}" * 40
    ),
    "JSON of blocks": "{% filter tojson %}" * 40 + '"' + "{% endfilter %}" * 40,
    "blocks of blocks": "".join(
        f"{{% block b{i} %}}{{{{ self.b{i + 1}() }}}}{{{{ self.b{i + 1}() }}}}{{% endblock %}}"
        for i in range(40)
    )
    + "{% block b40 %}{% endblock %}",
    "loops over constants": (
        "{% for a in X %}{% for b in X %}{% for c in X %}{% endfor %}{% endfor %}{% endfor %}"
    ).replace("X", f"'{'x' * 999}'"),
}

# What Jinja or Python itself refuses.
REFUSED = ("a range too long", "a macro without end", "words without end")


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_without_an_end_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "loops in loops":  # one of them spends the whole budget, which takes seconds
        monkeypatch.setattr(template_limits, "BUDGET", 2**22)
    chat = ChatTokenizer(golden_tokenizer(), template=BOMBS[name] + CHATML_TEMPLATE)
    row = Conversation((Message("user", "q"), Message("assistant", "a")), row=0, line=1)
    (result,) = chat.tokenize_many([row]) if name in REFUSED else (None,)
    if result is not None:
        assert isinstance(result, UnusableRow)
        assert "use data.chat_template=" in str(result)
        return
    steps = 524_288 if name == "loops in loops" else 16_384
    with pytest.raises(DataError, match=rf"chat template.*\b{steps:,}\b"):
        chat.tokenize(row)


def test_the_variables_of_a_template_without_an_end_are_found() -> None:
    for bomb in BOMBS.values():
        template = bomb + "{{ wanted }}"
        assert "wanted" in variables_of(template)


def test_a_template_that_is_nested_too_deep_is_broken() -> None:
    for deep in ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "{% if 1 %}" * 5_000):
        with pytest.raises(DataError, match=r"RecursionError|MemoryError|line 1\b"):
            Renderer(deep, {})


def test_a_bounded_template_writes_what_transformers_writes() -> None:
    hard = {
        "a loop over what is no list": "{% for a in messages | map(attribute='role') %}"
        "{{ loop.index }}{{ loop.last }}{{ loop.nextitem }}{{ a }}{% endfor %}",
        "a loop over nothing": "{% for a in nobody %}{{ a }}{% else %}none{% endfor %}",
        "numbers that are no widths": "{{ '%d: %s' % (1735689600, 'x') }}"
        "{{ '{:>9} {}'.format(1735689600, 2**40) }}{{ '%5.2f' | format(2.5) }}"
        "{{ 'x'.center(9) }}{{ '20241125 %s' % 1 }}{{ 17 % 5 }}{{ 'a' | indent(2) }}",
        "a condition": "{% for a in messages if a.role == 'user' %}{{ loop.length }}{% endfor %}",
        "a recursion": "{% for a in [[1], [2, [3]]] recursive %}{{ loop(a) if a is iterable "
        "else a }}{% endfor %}",
        "a macro": "{% macro f(x, y=2) %}{{ x }}{{ y }}{{ caller() if caller }}{% endmacro %}"
        "{{ f(1) }}{% call f('a', y='b') %}c{% endcall %}",
        "sums": "{{ 2 * 3 }}{{ 'a' * 3 }}{{ [1] * 2 }}{{ 2 ** 10 }}{{ 'a' ~ 1 ~ none }}",
        "a set block": "{% set x %}{% for a in 'ab' %}{{ a }}{% break %}{% endfor %}{% endset %}"
        "{{ x }}",
        "ranges": "{% for i in range(3, 0, -1) %}{{ i }}{% endfor %}{{ range(4) | sum }}",
    }
    turns = [{"role": m.role, "content": m.content} for m in cases()["multi"].messages]
    given = {"messages": turns, "tools": None, "add_generation_prompt": True}
    given |= golden_tokenizer().special_tokens_map
    for name, template in {**templates(), **hard}.items():
        compiled, _ = compile_bounded(template)
        plain = chat_template_utils._compile_jinja_template(template)
        assert compiled.render(given) == plain.render(given), name


def test_transformers_own_templates_stay_unbounded() -> None:
    compile_bounded(CHATML_TEMPLATE)
    plain = chat_template_utils._compile_jinja_template("{{ 'x' * 3 }}{{ lipsum is defined }}")
    assert plain.render() == "xxxTrue"


# What templates write as JSON


def test_what_is_written_as_json_counts_as_written() -> None:
    result = '{"sum": 3, "why": "one \\"and\\" two\\n", "wo": "K\u00f6ln"}'
    call = ToolCall(
        "add", {"text": 'a "b"\n\u00e9 <x>', "deep": [{"k\u00e9y": "\\"}]}, id="call00001"
    )
    row = Conversation(
        (
            Message("user", "q"),
            Message("assistant", "", tool_calls=(call,)),
            Message("tool", result, name="add", tool_call_id="call00001"),
            Message("assistant", "It is 3."),
        ),
        row=0,
        line=1,
        tools=(TOOL,),
    )
    mistral = templates()["mistral"]
    ascii_too = mistral.replace("| tojson", "| tojson(ensure_ascii=True, indent=2, sort_keys=true)")
    assert ascii_too != mistral
    for template in (mistral, ascii_too, templates()["llama3"], templates()["qwen"]):
        (sample,) = ChatTokenizer(golden_tokenizer(), template=template).tokenize(row)
        turns = [
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {
                        "type": "function",
                        "id": call.id,
                        "function": {"name": call.name, "arguments": dict(call.arguments)},
                    }
                ],
            },
            {"role": "tool", "content": result, "name": "add", "tool_call_id": call.id},
            {"role": "assistant", "content": "It is 3."},
        ]
        ids = golden_tokenizer().apply_chat_template(
            turns, tools=[TOOL], chat_template=template, return_dict=False
        )
        assert sample.token_ids.tolist() == ids
    dropped = mistral.replace("message['content'] | tojson", "'done' | tojson")
    with pytest.raises(UnusableRow, match=r"message 2 \(tool\)"):
        ChatTokenizer(golden_tokenizer(), template=dropped).tokenize(row)
    assert json.loads(result)["sum"] == 3
