"""Executed notebooks as web pages: self-contained, without a request to anywhere, readable on a phone and in print.

nbconvert's full templates fetch MathJax from the network and carry 300 kB of styles. Here its `basic` template makes
the body, the page around it is ours, and equations are MathML, which browsers set by themselves.
"""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path

import jinja2
import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbconvert.preprocessors import ExtractOutputPreprocessor
from pygments.formatters import HtmlFormatter

from ratlip.errors import RunError
from ratlip.files import shown, write_text

LIMIT = 2 * 2**20 - 2**14  # bytes of a page; larger files cannot be committed
# The templates of `ratlip/report/templates`; what goes into an HTML one is escaped
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("ratlip.report"),
    autoescape=jinja2.select_autoescape(["html.j2"]),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def equation(tex: str, display: bool) -> str:
    """TeX as MathML that keeps the TeX as its alternative text; the TeX itself where it cannot be converted."""
    source = html.escape(tex.strip())
    upright = re.sub(r"\\mathrm(?=\{\w\w+\})", r"\\text", tex.strip())  # one word, not a product of letters
    try:
        mathml = convert(upright, display="block" if display else "inline")
    except Exception:  # the library has some twenty errors without a base of their own
        mathml = ""
    if not mathml or re.search(r"\\[A-Za-z]", mathml):  # a command that the library does not know stays as it is
        return f'<code class="tex">{source}</code>'
    mathml = mathml.replace("<math ", f'<math alttext="{source}" ', 1)
    return f'<span class="equation">{mathml}</span>' if display else mathml


class _Renderer(IPythonRenderer):
    def block_math(self, body: str) -> str:
        return equation(body, display=True)

    def inline_math(self, body: str) -> str:
        return equation(body, display=False)


class _Exporter(HTMLExporter):
    @jinja2.pass_context
    def markdown2html(self, context, source: str) -> str:
        return MarkdownWithMath(renderer=_Renderer(escape=False, exclude_anchor_links=True)).render(source)


def describe_pictures(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Give each picture of a notebook the heading above it as alternative text, in place."""
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = [heading, *(line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#"))][-1]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.metadata.setdefault("image/png", {})["alt"] = f"Figure: {heading}"
    return notebook


def notebook_page(notebook: str | Path, out: str | Path, source: str | None = None) -> str:
    """Convert an executed notebook to the page `out` and return its title. RunError where it cannot be read.

    `source`: a link to the notebook. Where the page would exceed 2 MiB, its pictures become files in
    `<out without .html>_files`.
    """
    notebook, out = Path(notebook), Path(out)
    try:
        content = describe_pictures(nbformat.read(notebook, 4))
    except (OSError, ValueError, nbformat.reader.NotJSONError) as error:
        mend = "delete it and run `make reproduce` again"
        raise RunError(f"{shown(notebook)}: not a readable notebook ({type(error).__name__}); {mend}") from error
    exporter = _Exporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(content)
    apart = out.with_name(f"{out.stem}_files")
    shutil.rmtree(apart, ignore_errors=True)
    if len(body.encode()) > LIMIT:
        names = ExtractOutputPreprocessor(output_filename_template="{cell_index:02}_{index}{extension}", enabled=True)
        exporter.register_preprocessor(names)
        body, resources = exporter.from_notebook_node(content, {"output_files_dir": apart.name})
        apart.mkdir(parents=True)
        for name, data in resources["outputs"].items():
            (out.parent / name).write_bytes(data)
    title = next((c.source.splitlines()[0].lstrip("# ") for c in content.cells if c.cell_type == "markdown"), out.stem)
    style = HtmlFormatter(style="default").get_style_defs(".highlight")
    page = TEMPLATES.get_template("notebook.html.j2").render(title=title, body=body, source=source, highlight=style)
    write_text(out, page)
    return title
