"""What may be said: credentials, control characters and endless values never are."""

import json
from pathlib import Path

import pytest

from roll_sft.base.text import printable, redacted, shown
from roll_sft.training.run_folder import write_json


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://me:secret@host:5000/x", "http://***@host:5000/x"),
        ("at https://a@b and postgresql://u:p@h/db", "at https://***@b and postgresql://***@h/db"),
        ("http://me:se@cret@host/x", "http://***@host/x"),
        ("http://me:se/cret@host/x", "http://***@host/x"),
        ("http://me:se'cret@host/x", "http://***@host/x"),
        ("https://host/f.jsonl?X-Amz-Signature=abc&b=c", "https://host/f.jsonl?***"),
        ("'https://host/f?eyJhbGciOi'; try again", "'https://host/f?***'; try again"),
        ("https://host/f#access_token=abc", "https://host/f#***"),
        ("s3://key:secret@bucket/f", "s3://***@bucket/f"),
        ("s3://bucket/f?versionId=3", "s3://bucket/f?***"),
        ("suffix '.jsonl?token=abc&b=c' is", "suffix '.jsonl?token=***&b=***' is"),
        ("token hf_abcdefghijklmnopqrstuvwx of", "token hf_*** of"),
    ],
)
def test_credentials_are_masked(text: str, masked: str) -> None:
    assert redacted(text) == masked
    assert redacted(masked) == masked


@pytest.mark.parametrize(
    "text",
    [
        "http://host/a@b",
        "http://host:8080/a@b",
        "sqlite:////tmp/mlflow.db",
        "s3://bucket/part-?.jsonl",
        "hf://datasets/org/name@main/rows.jsonl",
        "abfss://container@account.dfs.core.windows.net/rows.jsonl",
        "set train.global_batch_tokens=3600, or model.tokenizer_path=x",
        "me@example.org: what?",
    ],
)
def test_what_is_no_credential_stays(text: str) -> None:
    assert redacted(text) == text


def test_a_file_of_json_has_no_credentials(tmp_path: Path) -> None:
    report = {"sources": [{"path": "http://me:secret@host/x", "rows": 3}]}
    write_json(tmp_path / "report.json", report)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == {"sources": [{"path": "http://***@host/x", "rows": 3}]}


def test_a_line_for_a_terminal_has_no_control_characters_and_an_end() -> None:
    assert printable("a\x1b[31m\u202eb\r\tc\ud800\nd") == "a\\x1b[31m\\u202eb\\r\tc\\ud800\nd"
    assert printable("caf\u00e9 \u4f60\u3000\U0001f469\u200d\U0001f680") == (
        "caf\u00e9 \u4f60\u3000\U0001f469\u200d\U0001f680"
    )
    cut = printable(f"value {'x' * 100_000}; remedy")
    assert len(cut) < 2100
    assert cut.startswith("value x")
    assert cut.endswith("; remedy")


@pytest.mark.parametrize(
    "value", ["x" * 10**6, ["x" * 10**6] * 10**3, {"a": "b" * 10**6}, 10**200, object()]
)
def test_a_value_is_shown_in_some_hundred_characters(value: object) -> None:
    assert len(shown(value)) < 500


def test_a_cut_value_keeps_no_part_of_a_password() -> None:
    assert "secret" not in shown(f"http://me:{'secret' * 100}@host/x")
