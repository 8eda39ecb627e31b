"""Executed notebooks as web pages: self-contained, without a request to anywhere, readable on a phone and in
print.

nbconvert's full templates fetch MathJax from the network and carry 300 kB of styles. Here its `basic`
template makes the body, the page around it is ours, and equations become pictures with their TeX as
alternative text.
"""

from __future__ import annotations

import base64
import html
import io
import re
from functools import lru_cache
from pathlib import Path

import nbformat

from ratlip.errors import RunError
from ratlip.files import shown, write_text

LIMIT = 2 * 2**20 - 2**14  # bytes of a page; larger files cannot be committed
# What Matplotlib's TeX does not know, and what it calls it
_OTHER_WORDS = (
    (r"\\[td]frac", r"\\frac"),
    (r"\\frac\s*(\w)\s*(\w)", r"\\frac{\1}{\2}"),
    (r"\\sqrt\s+(\w)", r"\\sqrt{\1}"),
    (r"\\text\b", r"\\mathrm"),
    (r"([_^])(\\mathrm\{[^{}]*\})", r"\1{\2}"),
    (r"\\[lr]Vert\b", r"\\Vert "),
    (r"\\[lr]vert\b", r"\\vert "),
    (r"\\(ge|le|ne)\b", r"\\\1q"),
    (r"\\bmod\b", r"\\ \\mathrm{mod}\\ "),
    (r"\\(?:[bB]ig|[bB]igg)[lr]?\b", ""),
    (r"\s*\n\s*", " "),
)


def environment():
    """The Jinja environment of `ratlip/templates`, which escapes whatever it is given."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("ratlip.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def equation(tex: str, display: bool) -> str:
    """TeX as an HTML picture; where Matplotlib cannot set it, the TeX itself."""
    source = html.escape(tex.strip())
    drawn = _drawn(tex.strip())
    if drawn is None:
        return f'<code class="tex">{source}</code>'
    data, width, height, depth = drawn
    place = "" if display else f";vertical-align:{-depth:.2f}em"
    picture = (
        f'<img class="math" alt="{source}" src="data:image/svg+xml;base64,{data}" '
        f'style="width:{width:.2f}em;height:{height:.2f}em{place}">'
    )
    return f'<span class="equation">{picture}</span>' if display else picture


@lru_cache(maxsize=512)
def _drawn(tex: str) -> tuple[str, float, float, float] | None:
    """SVG (base64), width, height and depth in em; None where Matplotlib's TeX does not know a command."""
    from matplotlib import rc_context
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import math_to_image

    tag = re.search(r"\\qquad(?:\s*\\qquad)?\s*\((\d+)\)\s*$", tex)  # the number of an equation stands by itself
    body = tex[: tag.start()].rstrip(" ,\n") + (rf"\qquad\qquad ({tag[1]})" if tag else "") if tag else tex
    body = _underbraces(body)
    for old, new in _OTHER_WORDS:
        body = re.sub(old, new, body)
    body = re.sub(r"\\mathrm\{[^{}]*\}", lambda words: words[0].replace(" ", r"\ "), body)
    size, file = 12.0, io.BytesIO()
    with rc_context({"mathtext.fontset": "cm", "svg.hashsalt": "ratlip", "svg.fonttype": "path"}):
        try:
            depth = math_to_image(f"${body}$", file, prop=FontProperties(size=size), dpi=72, format="svg")
        except ValueError:
            return None
    svg = file.getvalue().decode()
    width, height = (float(n) / size for n in re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg).groups())
    svg = re.sub(
        r"<metadata>.*?</metadata>|<\?xml.*?\?>|<!DOCTYPE.*?>|\n\s*",
        lambda m: " " if "\n" in m[0][:1] else "",
        svg,
        flags=re.DOTALL,
    ).strip()
    return base64.b64encode(svg.encode()).decode(), width, height, depth / size


def _underbraces(tex: str) -> str:
    r"""`\underbrace{what}_{words}` as `\underset{words}{what}`, which Matplotlib has."""
    while (start := tex.find(r"\underbrace{")) >= 0:
        middle = _closing(tex, start + len(r"\underbrace"))
        end = _closing(tex, middle + 1) if tex[middle : middle + 2] == "_{" else middle
        what, words = tex[start + len(r"\underbrace") : middle], tex[middle + 1 : end] or "{}"
        tex = tex[:start] + rf"\underset{words}{what}" + tex[end:]
    return tex


def _closing(tex: str, start: int) -> int:
    """The place after the brace that closes the one at `start`; the end of the text where none does."""
    depth = 0
    for place in range(start, len(tex)):
        if tex[place] in "{}" and tex[place - 1 : place] != "\\":
            depth += 1 if tex[place] == "{" else -1
            if depth == 0:
                return place + 1
    return len(tex)


def _exporter():
    from jinja2 import pass_context
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def block_math(self, body: str) -> str:
            return equation(body, display=True)

        def inline_math(self, body: str) -> str:
            return equation(body, display=False)

    class Exporter(HTMLExporter):
        @pass_context
        def markdown2html(self, context, source):
            return MarkdownWithMath(renderer=Renderer(escape=False, exclude_anchor_links=True)).render(source)

    return Exporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)


def described(notebook):
    """Give each picture of a notebook the heading above it as alternative text, in place."""
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = next(
                (line.lstrip("# ") for line in reversed(cell.source.splitlines()) if line.startswith("#")), heading
            )
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.metadata.setdefault("image/png", {})["alt"] = f"Figure: {heading}"
    return notebook


def notebook_page(notebook: str | Path, out: str | Path) -> Path:
    """Convert an executed notebook to the page `out`. RunError where it cannot be read.

    Where the page would exceed 2 MiB, its pictures become files in `<out without .html>_files`.
    """
    notebook, out = Path(notebook), Path(out)
    try:
        content = described(nbformat.read(notebook, 4))
    except (OSError, ValueError, nbformat.reader.NotJSONError) as error:
        raise RunError(
            f"{shown(notebook)}: not a readable notebook ({type(error).__name__}); "
            "delete it and run `make reproduce` again"
        ) from error
    body = _exporter().from_notebook_node(content)[0]
    if len(body.encode()) > LIMIT:
        body = _pictures_apart(body, out.with_name(f"{out.stem}_files"))
    title = next((c.source.splitlines()[0].lstrip("# ") for c in content.cells if c.cell_type == "markdown"), out.stem)
    page = (
        environment()
        .get_template("notebook.html.j2")
        .render(title=title, body=body, source=notebook.name, highlight=_highlight())
    )
    write_text(out, page)
    return out


def _highlight() -> str:
    from pygments.formatters import HtmlFormatter

    return HtmlFormatter(style="default").get_style_defs(".highlight")


def _pictures_apart(body: str, folder: Path) -> str:
    """Write the pictures that are embedded in `body` into `folder`, and link them instead."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    count = 0

    def link(found: re.Match) -> str:
        nonlocal count
        count += 1
        (folder / f"{count:02}.png").write_bytes(base64.b64decode(found[1]))
        return f'src="{folder.name}/{count:02}.png"'

    return re.sub(r'src="data:image/png;base64,([^"]+)"', link, body)
