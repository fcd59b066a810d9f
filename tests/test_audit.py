"""What `make audit` finds, and that it finds nothing here."""

import pytest

from tools import audit

SERVICE = {"name": "a", "skip_reason": "not found on PyPI"}


def test_the_tree_holds_no_secret_and_what_is_installed_may_be_used() -> None:
    assert list(audit.secrets()) == []
    assert [each for each in audit.licences() if "is not installed" not in each] == []


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("token = 'hf_" + "aB3dEf6hIj9kLm2n'", "a token of the Hugging Face hub"),
        ("key: AKIA" + "IOSFODNN7EXAMPL3", "a key of AWS"),
        ("-----BEGIN RSA " + "PRIVATE KEY-----", "a private key"),
        ("pass" + "word = 'correct-horse'", "a password"),
        ("password: ${oc.env:PASSWORD}", None),
        ("HF_TOKEN=hf_" + "CanaryCanaryCanary1", None),
    ],
)
def test_a_secret_is_known_by_its_form(line: str, kind: str | None) -> None:
    assert next(audit.secrets_in(line), None) == kind


@pytest.mark.parametrize(
    ("licence", "is_permissive"),
    [
        ("MIT", True),
        ("Apache-2.0 AND MIT", True),
        ("Apache-2.0 OR GPL-3.0-only", True),
        ("MPL-2.0 AND MIT", False),
        ("BSD License; GNU General Public License v3 (GPLv3)", False),
        ("LGPL-2.1", False),
        ("Proprietary", False),
        ("", False),
    ],
)
def test_a_licence_that_asks_for_more_than_its_notice_needs_a_reason(
    licence: str, is_permissive: bool
) -> None:
    assert audit.is_permissive(licence) == is_permissive


def test_a_vulnerability_names_its_cure_and_a_service_that_knows_nothing_is_a_finding() -> None:
    found = {"name": "b", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
    assert list(audit.known_of([SERVICE, found])) == [
        "a: not checked: not found on PyPI",
        "b 1: CVE-1; fixed in 2",
    ]
    (line,) = audit.known_of([SERVICE, SERVICE])
    assert "not checked: the service knows none of 2 packages" in line
    assert list(audit.known_of([{"name": "c", "version": "1", "vulns": []}])) == []
