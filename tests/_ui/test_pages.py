"""Pages from templates: values are escaped, missing ones are errors, and HTML stands in templates only."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kilotune._ui.pages import render
from tests.support.paths import ROOT

SOURCE = ROOT / "src" / "kilotune"
HOSTILE = "<script>alert('1')</script> & \"x\""
TAGS = (
    "a|b|body|br|button|code|dd|div|dl|dt|em|figcaption|figure|form|h[1-6]|head|hr|html|i|iframe|img|input|li|link|main"
    "|meta|ol|p|pre|script|section|small|span|strong|style|sub|sup|table|tbody|td|th|thead|title|tr|ul"
)
HTML = re.compile(rf"</?(?:{TAGS})(?=[\s>/]|$)|<!doctype|&(?:amp|gt|lt|nbsp|quot|#\d+);", re.IGNORECASE)

Renderer = Callable[..., str]


@pytest.fixture
def rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Renderer:
    """Renders a page with this body from a package of its own."""
    name = re.sub(r"\W", "_", f"pages_of_{request.node.name}")
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)

    def one(body: str, **values: object) -> str:
        blocks = f"{{% block title %}}{{{{ title }}}}{{% endblock %}}{{% block body %}}{body}{{% endblock %}}"
        (tmp_path / name / "page.html").write_text(f'{{% extends "base.html" %}}{blocks}')
        return render(name, "page.html", **{"title": "a title", **values})

    return one


def body_of(page: str) -> str:
    """What stands in a page's <main>, without white space."""
    return re.sub(r"\s", "", page.split("<main>")[1].split("</main>")[0])


def test_facts_are_escaped(rendered: Renderer) -> None:
    page = rendered("{{ facts(values) }}", values={"a<b": "c&d"})
    assert body_of(page) == "<dl><dt>a&lt;b</dt><dd>c&amp;d</dd></dl>"


@pytest.mark.parametrize(
    "body",
    [
        "",  # it is the page's title
        "{{ title }}",
        "{% call section(title) %}{{ title }}{% endcall %}",
        "{{ table([title], [[title]], title) }}",
        "{% call(row) table([title ~ '\n'], [title]) %}<td>{{ row }}</td>{% endcall %}",
        "{{ figure(b, 'png', title, title) }}",
        "{{ facts({title: title}) }}",
    ],
)
def test_text_is_escaped_wherever_it_stands(rendered: Renderer, body: str) -> None:
    page = rendered(body, title=HOSTILE, b=b"\x00\xff")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert '"x"' not in page
    assert rendered(body, title="plain", b=b"\x00\xff").count("<") == page.count("<"), "no tag came in"


def test_a_table_has_the_cells_and_keeps_new_lines_of_its_head(rendered: Renderer) -> None:
    head = "<thead><tr><th>a<br>&lt;b</th></tr></thead>"
    frame = '<divclass="scroll"><tableclass="{}">{}<tbody>{}</tbody></table></div>'
    page = rendered("{{ table(['a\n<b'], [['1\n2'], ['3']], 'text') }}")
    assert body_of(page) == frame.format("text", head, "<tr><td>12</td></tr><tr><td>3</td></tr>")
    page = rendered("{% call(row) table(['a\n<b'], [1, 2]) %}<td><b>{{ row }}</b></td>{% endcall %}")
    assert body_of(page) == frame.format("", head, "<tr><td><b>1</b></td></tr><tr><td><b>2</b></td></tr>")


def test_a_picture_is_within_the_page(rendered: Renderer) -> None:
    page = rendered("{{ figure(b, 'png', 'seen', 'said') }}", b=b"\x00\xff\x10")
    assert '<img alt="seen" src="data:image/png;base64,AP8Q">' in page
    assert "<figcaption>said</figcaption>" in page


@pytest.mark.parametrize("body", ["{{ nothing }}", "{% if nothing %}{% endif %}", "{{ values.nothing }}"])
def test_a_missing_value_is_an_error(rendered: Renderer, body: str) -> None:
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError, match="nothing"):
        rendered(body, values={})


# -- HTML stands in templates only -------------------------------------------------------------------


def tags_in_strings(source: str) -> list[str]:
    """Every HTML tag or entity in a string of Python code, with its line."""
    strings = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return [f"{node.lineno}: {found[0]}" for node in strings for found in HTML.finditer(str(node.value))]


def test_no_python_file_has_html_in_its_strings() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 100
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in tags_in_strings(path.read_text("utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "planted",
    ["'<p class=\"x\">'", "f'<td>{x}'", "f'<h1{x}>'", "'x</section>\\n'", "'a<br>b'", "'x&nbsp;y'", "'<BR/>'"],
)
def test_html_in_a_string_is_found(planted: str) -> None:
    assert len(tags_in_strings(f"x = 1\ny = {planted}\n")) == 1


def test_what_is_no_html_is_not_called_so() -> None:
    assert tags_in_strings("x = '<s>', '</s>', 'text/html', '<pad>', 'a < b', '<unk>', 'a & b;'") == []
    assert tags_in_strings("x = 1  # <p>\n") == []
