"""The plot of losses: a page that is whole by itself, and a picture where matplotlib is."""

import re
from pathlib import Path
from xml.etree import ElementTree

from hanok.training.loss_page import MOST_POINTS, Curves, page_of, write_plots

LINES = [
    {"step": 0, "held_out_loss": 4.0},
    *(
        {"step": step, "loss": 4.0 / step, "learning_rate": 1e-3 / step, "held_out_loss": None}
        for step in range(1, 20)
    ),
    {"step": 20, "loss": 0.2, "learning_rate": 0.0, "held_out_loss": 0.25},
]


def drawn(page: str) -> dict[str, list[tuple[float, float]]]:
    """The points of each line, read from the SVG."""
    (svg,) = re.findall(r"<svg.*</svg>", page, re.S)
    return {
        line.attrib["class"]: [
            (float(x), float(y)) for x, y in (p.split(",") for p in line.attrib["points"].split())
        ]
        for line in ElementTree.fromstring(svg).iter("polyline")
    }


def test_the_page_draws_every_step_and_loads_nothing() -> None:
    page = page_of("a <b> & c", Curves.of(LINES))
    assert "a &lt;b&gt; &amp; c" in page
    assert not re.search(r"<script|https?:|\bsrc=|\burl\(|@import|<link", page)
    assert (
        "loss 4.0000 at first, 0.2000 in the end; held out 4.0000 at first, 0.2500 in the end"
        in page
    )
    lines = drawn(page)
    assert [len(lines[name]) for name in ("loss", "held", "rate")] == [20, 2, 20]
    down = [y for _, y in lines["loss"]]
    assert down == sorted(down)  # a lower loss is lower on the page
    assert lines["held"][0][0] < lines["loss"][0][0]  # step 0
    assert lines["held"][-1][0] == lines["loss"][-1][0]


def test_one_step_and_none_are_pages_too() -> None:
    assert "No step has been done yet" in page_of("t", Curves.of([]))
    only = page_of("t", Curves.of([{"step": 1, "loss": 1.0, "learning_rate": 0.0}]))
    assert len(drawn(only)["loss"]) == 1


def test_a_long_training_is_drawn_with_means() -> None:
    lines = [{"step": step, "loss": float(step % 2)} for step in range(1, 10 * MOST_POINTS)]
    points = Curves.of(lines).loss
    assert len(points) <= MOST_POINTS + 2
    assert (points[0], points[-1][0]) == ((1, 1.0), 10 * MOST_POINTS - 1)
    assert all(value == 0.5 for _, value in points[1:-2])


def test_a_loss_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    write_plots(tmp_path, "t", [*LINES, {"step": 21, "loss": float("nan"), "learning_rate": 0.0}])
    assert len(drawn((tmp_path / "loss.html").read_text())["loss"]) == 20
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
