"""The page of a report in a real browser, from a file: its plots, its table, and that it asks no one.

Needs Chromium with its driver and selenium, as tests/server/test_page.py does; skipped without them.
"""

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from hanok.bench.page import page_of
from hanok.bench.report import Report

from .conftest import made_report


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip(
            "there is no Chromium with its driver: apt-get install chromium chromium-driver"
        )
    options = ChromeOptions()
    options.binary_location = program
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1440,1000"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={profile}")
    options.add_argument("--disable-background-networking")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with Chrome(options=options, service=Service(executable_path=driver)) as found:
        yield found


class Opened:
    """A page that was opened from disk."""

    def __init__(self, browser: Chrome, report: Report, folder: Path) -> None:
        self.browser = browser
        file = folder / "bench.html"
        file.write_text(page_of(report), encoding="utf-8")
        browser.get(file.as_uri())

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(item => item.textContent)"
        found: list[str] = self.browser.execute_script(script, selector)
        return found

    def run(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def marks(self, plot: str) -> list[int]:
        """Return which rows have a mark in a plot, each as often as it has."""
        script = (
            f"return [...document.querySelectorAll('#{plot} .mark')]"
            ".map(mark => Number(mark.dataset.row))"
        )
        found: list[int] = self.run(script)
        return sorted(found)

    def choose(self, group: str, text: str) -> None:
        for button in self.browser.find_elements(By.CSS_SELECTOR, f"#{group} button"):
            if button.text == text:
                button.click()
                return
        raise AssertionError(f"there is no button {text!r}")


@pytest.fixture
def page(browser: Chrome, report: Report, tmp_path: Path) -> Opened:
    return Opened(browser, report, tmp_path)


def test_both_plots_have_a_mark_for_each_row(page: Opened, report: Report) -> None:
    batch_1 = [i for i, row in enumerate(report.rows) if row.workload.batch == 1]
    assert page.marks("latency") == batch_1
    seen: Counter[int] = Counter()
    for text in ("128 + 32", "512 + 32", "8 × 128 + 32"):
        page.choose("workloads", text)
        seen.update(page.marks("quality"))
    assert seen == Counter(range(len(report.rows)))


def test_axes_are_named_and_have_ticks(page: Opened) -> None:
    assert page.texts("#quality .axis") == [
        "tokens per second, prompt included",
        "KL divergence from the reference, nats a token",
    ]
    assert page.texts("#latency .axis") == ["tokens of the prompt", "time of the whole answer"]
    page.choose("latencies", "first token")
    assert page.texts("#latency .axis")[1] == "time to the first token"
    ticks = page.texts("#latency text:not(.axis):not(.name)")
    assert {"128", "512"} <= set(ticks)
    assert any(tick.endswith(" ms") for tick in ticks)


def test_marks_stand_where_the_figures_are(page: Opened, report: Report) -> None:
    """To the right is faster, above is nearer to the reference, and latency grows upwards."""
    script = (
        "return [...document.querySelectorAll('#%s .mark')].map(m => "
        "[Number(m.dataset.row), Number(m.getAttribute('cx')), Number(m.getAttribute('cy'))])"
    )
    points = {int(row): (x, y) for row, x, y in page.run(script % "quality")}
    for one, (x, y) in points.items():
        for other, (other_x, other_y) in points.items():
            ours, theirs = report.rows[one], report.rows[other]
            if ours.seconds < theirs.seconds:
                assert x > other_x
            assert ours.quality is not None
            assert theirs.quality is not None
            if (ours.quality.kl_mean or 0.0) < (theirs.quality.kl_mean or 0.0):
                assert y < other_y
    points = {int(row): (x, y) for row, x, y in page.run(script % "latency")}
    assert len(points) == 8
    for one, (x, y) in points.items():
        for other, (other_x, other_y) in points.items():
            ours, theirs = report.rows[one], report.rows[other]
            if ours.seconds < theirs.seconds:
                assert y > other_y
            if ours.workload.prompt_tokens < theirs.workload.prompt_tokens:
                assert x < other_x


def test_what_is_drawn_stays_inside(page: Opened) -> None:
    outside = page.run(
        """
        return [...document.querySelectorAll('svg.plot')].flatMap(svg => {
          const box = svg.getBoundingClientRect();
          return [...svg.querySelectorAll('.mark, text')].filter(item => {
            const own = item.getBoundingClientRect();
            return own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1
              || own.bottom > box.bottom + 1;
          }).map(item => item.textContent || item.dataset.row);
        });
        """
    )
    assert outside == []


def test_the_table_has_every_row_and_says_what_it_may(page: Opened, report: Report) -> None:
    lines = page.texts("tbody tr.row")
    assert len(lines) == len(report.rows)
    for row, line in zip(report.rows, lines, strict=True):
        assert row.label in line
    verdicts = page.texts("td.ratio")
    assert [text == "reference" for text in verdicts] == [row.is_reference for row in report.rows]
    assert "token 19, by 0.063" in lines[4]
    assert page.texts("tbody tr.group") == [
        "128 + 32 tokens",
        "512 + 32 tokens",
        "8 × 128 + 32 tokens",
    ]
    assert page.texts("#left li") == [
        "triton at 128 + 32 tokens: needs a CUDA device (found: cpu)."
    ]
    assert page.texts("#command") == [report.command]


def test_a_row_that_may_be_the_same_is_not_called_faster(browser: Chrome, tmp_path: Path) -> None:
    noisy = made_report(7, rounds=3, sigma=0.6)
    page = Opened(browser, noisy, tmp_path)
    verdicts = [row.verdict for row in noisy.rows if not row.is_reference]
    assert "same" in verdicts
    shown = [text for text in page.texts("td.ratio") if text != "reference"]
    assert [text.startswith("same") for text in shown] == [item == "same" for item in verdicts]


def test_a_mark_shows_its_row(page: Opened) -> None:
    page.run("document.querySelector('#quality .mark[data-row=\"2\"]').focus()")
    assert page.texts("#quality .tip.on b") == ["native"]
    assert page.run("return document.querySelector('tr[data-row=\"2\"]').classList.contains('on')")


def test_the_page_is_whole_and_its_data_cannot_leave_their_place(
    page: Opened, report: Report
) -> None:
    assert page.texts("h1") == [report.checkpoint.name]  # which has </script> in it
    assert [item for item in page.browser.get_log("browser") if item["level"] == "SEVERE"] == []
    assert page.run("return performance.getEntriesByType('resource').length") == 0
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")


def test_reports_with_holes_are_shown(browser: Chrome, report: Report, tmp_path: Path) -> None:
    rows = [
        replace(row, quality=None, peak_bytes=None, tokens_per_s=None, bandwidth_share=None)
        for row in report.rows
        if row.workload.batch == 8
    ]
    page = Opened(browser, replace(report, rows=tuple(rows), skipped=(), notes=()), tmp_path)
    assert page.texts("#quality svg text") == ["Quality was not measured."]
    assert page.texts("#latency svg text") == ["No row has one sequence."]
    assert len(page.texts("tbody tr.row")) == 2
    assert [item for item in page.browser.get_log("browser") if item["level"] == "SEVERE"] == []


def test_no_name_is_crossed_by_another_or_by_a_line_to_one(page: Opened) -> None:
    crossed = page.run(
        """
        const box = (item) => item.getBoundingClientRect();
        const meet = (one, other) => one.left < other.right - 2 && other.left < one.right - 2
          && one.top < other.bottom - 3 && other.top < one.bottom - 3;
        const names = [...document.querySelectorAll('#quality .name')];
        const lines = [...document.querySelectorAll('#quality .lead')];
        return names.flatMap((name) => [...names, ...lines]
          .filter((other) => other !== name && other.parentNode !== name.parentNode)
          .filter((other) => meet(box(name), box(other))).map(() => name.textContent));
        """
    )
    assert crossed == []
    assert len(page.texts("#quality .name")) >= 4
