"""Sound folders have no findings: every family's tiny checkpoint, as transformers saves it."""

from pathlib import Path

import pytest
from tests.models.test_families import CASES, save_random

import hanok
from hanok.check.folder import check_folder
from hanok.check.options import CheckOptions


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_found_in_a_familys_checkpoint(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    save_random(case, tmp_path)
    report = check_folder(tmp_path, CheckOptions(threads=1))
    kinds = {(finding.level, finding.kind) for finding in report.findings}
    # What is left out of a model that sees, or spelled in another way, is said. Files that the test
    # itself rewrites have no `format`.
    is_plain = not (case.vision or case.published or case.drop_prefix)
    assert kinds <= (set() if is_plain else {("note", "decided"), ("note", "no-format")})
    assert "model" in report.facts
    assert [item.check for item in report.skipped] == ["tokenizer and chat template"]


def test_nothing_is_found_in_the_bundled_model() -> None:
    report = check_folder(hanok.BUNDLED)
    assert report.findings == ()
    assert report.skipped == ()
