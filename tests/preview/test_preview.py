"""`roll-sft preview`: which rows it shows, what it says of the dropped ones, and a safe page."""

import html.parser
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from roll_sft import cli
from roll_sft.base.errors import ConfigError, DataError
from roll_sft.config.schema import DataConfig, ModelConfig, RunConfig, SourceConfig
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.chat.pieces import TextPiece
from roll_sft.job import prepare
from roll_sft.preview.page import page_of
from roll_sft.preview.rows import Choice, Preview, Reader, Shown, look
from tests import doors
from tests.doors import Outcome
from tests.tiny import tiny_tokenizer

door = doors.door
HOSTILE = (
    "</pre><script>alert('x')</script> & \"quoted\" <img src=x onerror=y> \x1b]0;t\x07 {{ 7*7 }}"
)


def chat(*turns: str) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]}


ROWS = [
    chat("one", HOSTILE),
    chat("two", ""),
    chat("three", "yes", "and", "no"),
    {"messages": [{"role": "critic", "content": "x"}]},
    chat("five", "word " * 200),
    chat("six", "short"),
    chat("seven", "a bit longer than short"),
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\nbroken")
    return path


@pytest.fixture
def seen(rows: Path) -> Callable[..., Preview]:
    """What is shown of two sources: rows, and the same as validation."""

    def call(**choice: Any) -> Preview:
        source = [SourceConfig(path=str(rows))]
        data = DataConfig(
            train=source,
            validation=[SourceConfig(path=str(rows), name="held_out")],
            sequence_length=256,
            overlong=choice.pop("overlong", "drop"),
        )
        config = RunConfig(model=ModelConfig(path="model"), data=data)
        tokenizer = tiny_tokenizer()
        options = prepare.source_options(data)
        return look(Reader(config, options, ChatTokenizer(tokenizer), tokenizer), Choice(**choice))

    return call


def names(preview: Preview) -> list[str]:
    return [f"{shown.source}:{shown.row}" for shown in preview.shown]


def supervised(preview: Preview, number: int) -> str:
    pieces = preview.shown[number].pieces
    return "".join(piece.text for piece in pieces if piece.is_supervised)


def test_the_first_rows_of_each_source(seen: Callable[..., Preview]) -> None:
    preview = seen()
    assert names(preview) == [f"{name}:{row}" for name in ("rows", "held_out") for row in (0, 2, 5)]
    assert supervised(preview, 1) == "yes<|im_end|>no<|im_end|>"
    assert supervised(preview, 0) == f"{HOSTILE}<|im_end|>"
    assert preview.num_rows == 12  # up to the third that is kept, of both
    first = preview.shown[0]
    assert first.place.endswith("rows.jsonl:1")
    assert first.num_supervised == sum(len(p.ids) for p in first.pieces if p.is_supervised)
    assert first.num_tokens == sum(len(p.ids) for p in first.pieces)


def test_rows_by_number_in_the_order_that_was_asked_for(seen: Callable[..., Preview]) -> None:
    preview = seen(rows=(6, 1, 2), source="rows")
    assert names(preview) == ["rows:6", "rows:2"]
    (dropped,) = preview.dropped
    assert (dropped.row, dropped.kind) == (1, "empty_response")
    with pytest.raises(ConfigError, match=r"^--index: .*'rows'.*\b8\b"):
        seen(rows=(0, 8))
    with pytest.raises(ConfigError, match=r"^--source: .*'x'.*\brows\b"):
        seen(source="x")


def test_the_longest_samples(seen: Callable[..., Preview]) -> None:
    assert names(seen(longest=2, source="rows")) == ["rows:0", "rows:2"]
    preview = seen(longest=1, source="held_out", overlong="truncate")
    assert names(preview) == ["held_out:4"]
    (shown,) = preview.shown
    assert shown.num_tokens == 256
    assert shown.cut_from is not None
    assert shown.cut_from > 256
    assert not supervised(preview, 0).endswith("<|im_end|>")


def test_dropped_rows_with_reason_and_place(seen: Callable[..., Preview]) -> None:
    preview = seen(dropped=True, source="rows")
    assert preview.shown == []
    found = {
        (row.row, row.place.rpartition(":")[2], row.kind, row.reason[:27])
        for row in preview.dropped
    }
    assert found == {
        (1, "2", "empty_response", "column 'messages' has no as"),
        (3, "4", "malformed", "messages[0] has role 'criti"),
        (4, "5", "overlong", "826 tokens, more than data."),
        (7, "8", "malformed", "broken JSON at column 1: Ex"),
    }
    assert preview.num_dropped == {"empty_response": 1, "malformed": 2, "overlong": 1}
    assert [row.excerpt[:10] for row in preview.dropped] == ["", "", "user: five", ""]


class Tags(html.parser.HTMLParser):
    """The tags of a page, the text of its samples, and what tells about each token."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.told: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.update(name for name, _ in attrs)
        given = dict(attrs)
        if given.get("class") == "tokens":
            self.texts.append("")
        if what := given.get("data-what"):
            assert given["tabindex"] == "0"  # a tap gives it the focus, where nothing points
            self.told.append(what)

    def handle_data(self, data: str) -> None:
        if self.texts and self.tags[-1] == "span":
            self.texts[-1] += data


def test_a_page_holds_text_and_no_markup_of_rows(seen: Callable[..., Preview]) -> None:
    text = page_of(seen(rows=(0, 1, 4)), title="<run>", summary="<b>7</b> rows")
    page = Tags()
    page.feed(text)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not [name for name in page.attributes if name.startswith("on")]
    assert len(page.texts) == 2  # row 0 of each source
    shown = "".join(page.texts)
    for part in (
        "</pre><script>alert('x')</script>",
        '"quoted"',
        "{{ 7*7 }}",
        "⟨U+001B⟩]0;t⟨U+0007⟩",
    ):
        assert part in shown
    assert "\x1b" not in text
    for outside in ("http://", "https://", "url(", "@import"):
        assert outside not in text
    assert "&lt;run&gt;: preview</title>" in text
    assert "prefers-color-scheme: dark" in text


def test_a_page_folds_a_long_context_and_never_what_is_supervised() -> None:
    supervised = range(1000, 1010)
    pieces = tuple(
        TextPiece(f"p{at} ", (at,), at, is_supervised=at in supervised, is_control=False)
        for at in range(1500)
    )
    sample = Shown("s", 0, "s:1", 1, 1, pieces, num_tokens=1500, num_supervised=10, cut_from=None)
    text = page_of(Preview(shown=[sample], num_rows=1), title="t", summary="s")
    folded = "".join(part.partition("</details>")[0] for part in text.split("<details>")[1:])
    assert [f">p{at} <" in folded for at in supervised] == [False] * 10
    assert [at for at in range(1500) if f">p{at} <" in folded][:1] == [80]
    assert "840 more tokens of context" in text
    page = Tags()
    page.feed(text)
    assert "".join(page.texts).split() == [f"p{at}" for at in range(1500)]
    assert page.told[1000:1002] == [
        "token 1000, id 1000, trained on",
        "token 1001, id 1001, trained on",
    ]


@pytest.fixture
def script(door: doors.Door, capsys: pytest.CaptureFixture[str]) -> doors.Door:
    """`roll-sft preview` in this process."""

    def call(*given: str) -> Outcome:
        capsys.readouterr()
        code = cli.main(["preview", *given])
        return Outcome(code, *capsys.readouterr())

    return call


def test_the_command_shows_and_writes(script: doors.Door, rows: Path, tmp_path: Path) -> None:
    doors.write_model(tmp_path / "model")
    common = ("model.path=model", f"data.train=[{{path: {rows}}}]", "data.sequence_length=256")
    shown = script(*common, "--index", "2")
    assert shown.code == 0, shown.stderr
    # No colours in a file, so what is trained on stands between marks.
    assert "\n⟦yes<|im_end|>⟧↵\n" in shown.stdout
    assert "rows:2" in shown.stdout
    assert "1 row read, 1 sample shown, nothing dropped" in shown.stdout
    dropped = script(*common, "--dropped")
    assert dropped.code == 0
    assert "8 rows read, dropped: 2 malformed, 1 empty_response, 1 overlong" in dropped.stdout
    assert "unless data.on_bad_row=skip" in " ".join(dropped.stdout.split())
    page = script(*common, "--longest", "1", "--html", "page.html")
    assert page.code == 0
    assert page.stdout == ""
    assert page.last_line.endswith("written to page.html")
    assert "<title>sft: preview</title>" in (tmp_path / "page.html").read_text()
    for arguments, expected in (
        (("--index", "99"), "--index: source 'rows' has no row 99"),
        (("--html", "none/page.html"), "--html: there is no folder"),
        (("--index", "1,x"), "argument --index: '1,x' is not numbers of rows, from 0"),
        (("--longest", "0"), "argument --longest: '0' is not a number from 1"),
        (("--longest", "1", "--dropped"), "not allowed with argument"),
        (("data.seed=1",), "data.seed: no such key"),
    ):
        refused = script(*common, *arguments)
        assert refused.code == 2
        assert expected in refused.last_line
    assert not (tmp_path / "outputs").exists()


def test_a_file_that_cannot_be_read_ends_with_code_3(script: doors.Door, tmp_path: Path) -> None:
    doors.write_model(tmp_path / "model")
    outcome = script(
        "model.path=model", "data.train=[{path: none.jsonl}]", "data.sequence_length=64"
    )
    assert outcome.code == DataError.exit_code
    assert outcome.last_line == "none.jsonl: no such file; check the path in the configuration"
