"""The report as a page: one file that opens from disk, with its plots, and asks no one for anything."""

import json
from dataclasses import asdict
from pathlib import Path

from hanok.bench.report import Report

TEMPLATE = Path(__file__).with_name("page.html")
PLACE = "REPORT"


def page_of(report: Report) -> str:
    """Return the page with the report in it."""
    data = json.dumps(asdict(report), ensure_ascii=False)
    # Nothing in it may end the element that holds it.
    data = data.replace("<", "\\u003c")
    before, _, after = TEMPLATE.read_text(encoding="utf-8").partition(f"/*{PLACE}*/")
    return before + data + after
