"""The audit's page: every check with its figure, what failed first said, readable everywhere."""

import pytest
from browser import Browser

from flagscale.evaluation.pages.audit import headline, render

PASSED = {
    "check": "equal models have no loss",
    "figure": 0.0,
    "tolerance": 1e-6,
    "verdict": "passed",
    "note": "largest loss of the teacher against itself",
}
FAILED = {
    "check": "labels are shifted once",
    "figure": "nan",
    "tolerance": 1e-5,
    "verdict": "failed",
    "note": "labels lie two tokens ahead of <their> inputs",
}
NOT_RUN = {
    "check": "TP1 equals TP2",
    "figure": None,
    "tolerance": None,
    "verdict": "not run",
    "note": "one core",
}


@pytest.mark.parametrize(
    ("findings", "expected"),
    [
        ([PASSED], "1 of 1 checks passed"),
        ([PASSED, NOT_RUN], "1 of 2 checks passed, 1 not run"),
        ([PASSED, FAILED, NOT_RUN], "1 of 3 checks failed, 1 not run"),
    ],
)
def test_the_headline_counts_what_was_not_run_too(findings: list, expected: str) -> None:
    assert headline(findings) == expected


def test_the_page_fits_a_phone_and_paper(browser: Browser) -> None:
    findings = [PASSED, FAILED, NOT_RUN] * 9
    page = render(findings, "a student of 22 layers")
    assert page == render(findings, "a student of 22 layers")
    assert "labels lie two tokens ahead of &lt;their&gt; inputs" in page
    assert page.count("1e-06") == 9
    browser.check(page)
