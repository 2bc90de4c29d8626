"""The page's Markdown, run by node: compared with markdown-it's CommonMark, and safe on any text.

Needs node: `apt-get install nodejs`. Without it these tests are skipped.
"""

import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

import hanok

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="there is no node: apt-get install nodejs")

PAGE = Path(hanok.__file__).parent / "server" / "page.html"
# What the page leaves out: markup, entities, code by indentation, underlined headings, definitions.
LEFT_OUT = ["code", "lheading", "html_block", "html_inline", "entity", "reference"]
ORACLE = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
ORACLE.disable(LEFT_OUT)
INNERLESS = ("hr", "br", "img")
BLOCKS = ("root", "ul", "ol", "blockquote", "table", "thead", "tbody", "tr", "li")


def rendered(texts: list[str]) -> list[list[Any]]:
    """Return what the page makes of texts: trees of [tag, properties, ...children]."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = page.index("// ---- Markdown"), page.index("// ---- trees to nodes")
    program = (
        f"{page[begin:end]}\nconst texts = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
        "console.log(JSON.stringify(texts.map(markdown)));"
    )
    found = subprocess.run(
        [NODE or "node", "-e", program],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    value: list[list[Any]] = json.loads(found.stdout)
    return value


class Tree(HTMLParser):
    """Reads markup as such trees."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[list[Any]] = [["root", {}]]
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].append([tag, dict(attrs)])
        if tag not in INNERLESS:
            self.open.append(self.open[-1][-1])

    def handle_endtag(self, tag: str) -> None:
        if tag not in INNERLESS:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].append(data)


def plain(tree: Any) -> Any:
    """Return a tree without what does not show: spaces between blocks, the names of attributes."""
    if isinstance(tree, str):
        return tree
    tag, given, *children = tree
    found: list[Any] = []
    for child in map(plain, children):
        if isinstance(child, str) and found and isinstance(found[-1], str):
            found[-1] += child
        else:
            found.append(child)
    if tag in BLOCKS:
        found = [child.strip("\n") if isinstance(child, str) else child for child in found]
        found = [child for child in found if child != ""]
    if tag == "code":
        found = [child.rstrip("\n") for child in found if child.strip("\n")]
    properties = {name: str(given[name]) for name in ("href", "start", "align") if name in given}
    if style := re.match(r"text-align:(\w+)", given.get("style", "")):
        properties["align"] = style[1]
    language = given.get("language", given.get("class", "").removeprefix("language-"))
    return [tag, properties | ({"language": language} if language else {}), *found]


def expected(text: str) -> Any:
    # The page shows the ends of lines as they are.
    return plain(Tree(ORACLE.render(text).replace("<br />\n", "\n")).open[0])


DOCUMENTS = {
    "emphasis": "Hello **bold** and *it* _x_ __y__ ***both*** a*b*c a_b_c **a *b** c* *a **b***",
    "half emphasis": "**not closed, a * b * c, snake_case_name, 2*3*4, _a_b_ c__d__e, ~~gone~~",
    "escapes": "\\*not\\* a\\b \\`x\\` \\[y\\](a.example)",
    "headings": "# H\n## H2 ##\ntext\nmore\n\n---\n###### six\n####### seven\n#none",
    "code": "```py\nx = 1\n\ny\n```\nafter\n\n~~~\n```\n~~~\n````md\n```\n````\n",
    "code that does not end": "text\n```\nx <b>\n\ny",
    "spans": "a `code *x*` b ``c ` d`` `` ` `` `e\nf` `` not closed `",
    "list": "- a\n- b\n  - c\n  - d\n- e\n\ntext",
    "loose list": "1. a\n2. b\n\n   more\n3. c",
    "numbers": "5) x\n6) y\n\n7. z\ntext\n2. no list",
    "deep list": "1. a\n   - b\n     1. c\n        > q\n2. d\n   ```js\n   x\n   ```\n\n   after",
    "markers": "* a\n+ b\n- c\n\n* * *\n* a\n\n  b\n* c\n-\n- a",
    "lines in a list": "- a\nlazy\n- b\n  # h\n\n\n- c\n    d",
    "quotes": "> q\n> r\n\n> s\nlazy\n\n> - a\n>   b\n> - c\n>\n> d\n> > e",
    "table": "| a | b | c |\n|:--|--:|:-:|\n| 1 | **2** | `x\\|y` |\n| 3 |\n\nend",
    "bare table": "a | b\n--|--\n1 | 2 | 3\n\n| no\n| --\n",
    "links": '[x](https://a.b/c_(d)) [y **z**](<http://a*b> "t") <https://e.f> [no] (g)',
    "unsafe": "[a](javascript:alert(1)) <javascript:alert(1)>",
    "markup": "<b>hi</b> <script>alert(1)</script> &lt; a < b\n\n<div>\n\n*x*",
    "lines": "one\ntwo  \nthree\\\nfour\n\n\n\nfive",
    "other scripts": "**한국어**와 *漢字* `코드`\n\n- 하나\n- 둘 🏠",
    "task list": "- [ ] open\n- [x] done",
}


@pytest.fixture(scope="module")
def documents() -> dict[str, Any]:
    return dict(zip(DOCUMENTS, rendered(list(DOCUMENTS.values())), strict=True))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_page_reads_markdown_as_commonmark_has_it(documents: dict[str, Any], name: str) -> None:
    assert plain(["root", {}, *documents[name]]) == expected(DOCUMENTS[name])


def test_links_are_found_in_sentences_and_pictures_are_not_fetched() -> None:
    texts = [
        "See https://a.example/b_c?d=(e). Or (https://f.example), then.",
        "![a picture](https://a.example/p.png)",
        "![](https://a.example/p.png)",
        "xhttps://a.example",
    ]
    link = "https://a.example/b_c?d=(e)"
    other, picture = "https://f.example", "https://a.example/p.png"
    assert rendered(texts) == [
        [
            [
                "p",
                {},
                "See ",
                ["a", {"href": link}, link],
                ". Or (",
                ["a", {"href": other}, other],
                "), then.",
            ]
        ],
        [["p", {}, ["a", {"href": picture}, "a picture"]]],
        [["p", {}, ["a", {"href": picture}, picture]]],
        [["p", {}, "xhttps://a.example"]],
    ]


TAGS = {
    *("p", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "blockquote", "ul", "ol", "li", "pre", "code"),
    *("table", "thead", "tbody", "tr", "th", "td", "em", "strong", "s", "a"),
}
PIECES = [
    *"a *b * ** _ __ ` `` ~~ \\ ( ) [ ] ! < > | # javascript: data: https://a.example".split(),
    *"[x]( <b> &lt; \x00 한 \U0001f600 [x](https://a.b) [y](JavaScript:z)".split(),
    *(" ", "    ", "\t", "\n", "\n\n", "- ", "1. ", "2) ", "> ", "```\n", "---\n"),
    *("| a | b |\n|---|:-:|\n", "| c |\n"),
]


def test_any_text_becomes_known_tags_and_links_that_are_safe() -> None:
    drawn = random.Random(0)
    texts = ["".join(drawn.choices(PIECES, k=drawn.randint(1, 30))) for _ in range(3000)]
    texts += [text * 3000 for text in (">", "* + ", "[", "*a ", "_a*", "``a", "- a\n", "|a", "![")]
    for text, tree in zip(texts, rendered(texts), strict=True):
        open_nodes: list[Any] = list(tree)
        while open_nodes:
            node = open_nodes.pop()
            if isinstance(node, str):
                continue
            tag, properties, *children = node
            assert tag in TAGS, text[:200]
            assert set(properties) <= {"href", "start", "align", "language"}
            assert re.match(r"https?://|mailto:", properties.get("href", "https://"), re.I)
            assert properties.get("align", "left") in ("left", "right", "center")
            open_nodes += children
