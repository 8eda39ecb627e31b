"""The report of a profile (`ratlip.report.page`, `html`): complete, private, and true to its parts."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from ratlip import files
from ratlip.errors import RunError
from ratlip.report import html, notebooks, page, tables
from ratlip.settings import load_settings

VERDICTS = [
    {"claim": "RAT beats CAT", "verdict": "supported", "evidence": "+0.21 [+0.03, +0.39], 3 seeds"},
    {"claim": "SA <helps> & more", "verdict": "undecided", "evidence": "+0.01 [-0.30, +0.32]"},
]
VOID = {"meta", "link", "img", "br", "hr", "input", "col"}


class Page(HTMLParser):
    """Links, pictures, and tags that were opened and never closed."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.alts, self.ids, self.open, self.wrong = [], [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]
        self.alts += [attributes.get("alt")] if tag == "img" else []
        self.ids |= {attributes["id"]} if "id" in attributes else set()
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append(tag)


def picture(path: Path, size=(40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)


def executed(path: Path, picture_from: Path | None = None) -> Path:
    import base64

    shown = new_code_cell("1 + 1", execution_count=1, outputs=[new_output("stream", text="two & <two>\n")])
    if picture_from:
        data = {"image/png": base64.b64encode(picture_from.read_bytes()).decode()}
        shown.outputs.append(new_output("display_data", data=data))
    notebook = new_notebook(
        cells=[
            new_markdown_cell(
                "# 4. Does it help?\n\n**Question.** With $x^a_i$ and\n\n$$\n\\bar d = \\tfrac12 x "
                "\\qquad\\qquad (7)\n$$"
            ),
            new_markdown_cell("## The pictures"),
            shown,
        ]
    )
    notebook.metadata["ratlip"] = {"code_sha256": "ab12", "seconds": 75}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A repository root of its own, with an empty report and no outputs."""
    for module in (page, notebooks, files):
        monkeypatch.setattr(module, "repository", lambda: tmp_path)
    monkeypatch.setenv("RATLIP_OUTPUTS", str(tmp_path / "outputs"))
    (tmp_path / "reports" / "smoke").mkdir(parents=True)
    return tmp_path


def check_links(opened: Path) -> Page:
    parsed = Page(opened.read_text("utf-8"))
    assert not parsed.wrong and not parsed.open
    for link in parsed.links:
        assert not re.match(r"\w+://|/|file:", link), link
        if link.startswith("#"):
            assert link[1:] in parsed.ids, link
        elif not link.startswith("data:"):
            assert (opened.parent / link).is_file(), link
    assert all(parsed.alts)
    return parsed


class TestVerdicts:
    def test_they_come_back(self, home):
        assert page.save_verdicts("reports/smoke", "04_ablation", VERDICTS) is None  # a notebook's last line
        page.save_verdicts("reports/smoke", "07_paper_versus_code", [{**VERDICTS[0], "evidence": 3.5}])
        found = page.load_verdicts("reports/smoke")
        assert list(found) == ["04_ablation", "07_paper_versus_code"] and found["04_ablation"] == VERDICTS
        assert found["07_paper_versus_code"][0]["evidence"] == "3.5"

    def test_without_a_report_nothing_is_written(self, home):
        page.save_verdicts(None, "04_ablation", VERDICTS)
        assert not list(home.rglob("*.json"))

    @pytest.mark.parametrize("report_folder", [None, "reports/smoke"])
    def test_a_verdict_without_evidence_is_refused(self, home, report_folder):
        with pytest.raises(RunError, match="04_ablation: verdict 2 has no evidence"):
            page.save_verdicts(report_folder, "04_ablation", [VERDICTS[0], {**VERDICTS[1], "evidence": " "}])
        assert not list(home.rglob("*.json"))

    @pytest.mark.parametrize("text", ["{", "[1]", '[{"claim": "a"}]'])
    def test_a_damaged_file_is_named(self, home, text):
        path = home / "reports/smoke/verdicts/04_ablation.json"
        path.parent.mkdir()
        path.write_text(text)
        with pytest.raises(RunError, match="verdicts/04_ablation.json: damaged"):
            page.load_verdicts("reports/smoke")


class TestPage:
    def test_an_empty_report_says_what_is_missing_and_how_to_make_it(self, home):
        opened = page.build("smoke")
        check_links(opened)
        text = opened.read_text("utf-8")
        assert opened == home / "reports/smoke/index.html"
        assert text.count("not answered yet") >= len(page.QUESTIONS)
        assert all(f"{name}: not run yet" in text for name in notebooks.STORY)
        assert "make reproduce PROFILE=smoke" in text and "ratlip grid --profile smoke --run" in text

    @pytest.fixture
    def full(self, home):
        folder = home / "reports/smoke"
        picture(folder / "figures/ablation.png")
        picture(folder / "figures/my_own.png")
        (folder / "figures/ablation.svg").write_text("<svg/>")
        table = pd.DataFrame({"model": ["<script>x</script>"], "score": ["0.5 ± 0.1"]})
        tables.write(tables.Table("measured_ablation", "Ours & nobody's", table, table, ["a note"]), folder / "tables")
        tables.write(tables.published_table("FID"), folder / "tables")
        executed(folder / "notebooks/04_ablation.ipynb", folder / "figures/ablation.png")
        executed(home / "notebooks/04_ablation.ipynb")
        page.save_verdicts("reports/smoke", "04_ablation", VERDICTS)
        return page.build("smoke")

    def test_links_resolve_and_nothing_is_asked_of_the_network(self, full):
        parsed = check_links(full)
        assert {
            "figures/ablation.png",
            "figures/ablation.svg",
            "tables/measured_ablation.csv",
            "tables/published_fid.tex",
            "notebooks/04_ablation.html",
            "../../notebooks/04_ablation.ipynb",
            "reproducibility.md",
            "provenance.json",
        } <= set(parsed.links)
        opened = check_links(full.parent / "notebooks/04_ablation.html")
        assert {"../index.html", "../../../notebooks/04_ablation.ipynb"} <= set(opened.links)
        for opened in full.parent.rglob("*.html"):
            assert (
                "http" not in re.sub(r'http-equiv|"http://www\.w3\.org/[^"]*"', "", opened.read_text("utf-8")).lower()
            )
            assert opened.stat().st_size < 2 * 2**20

    def test_what_comes_from_results_is_escaped(self, full):
        text = full.read_text("utf-8")
        assert "<script" not in text and "&lt;script&gt;" in text
        assert "SA &lt;helps&gt; &amp; more" in text and "Ours &amp; nobody&#39;s" in text

    def test_answers_come_first_with_mark_and_notebook(self, full):
        text = full.read_text("utf-8")
        assert text.index("RAT beats CAT") < text.index('id="figures"') < text.index('id="tables"')
        assert "✓ supported" in text and "? undecided" in text
        assert '<a href="notebooks/04_ablation.html">04_ablation</a>' in text
        assert "05_hidden_size_sweep" in text and text.count("not answered yet") >= len(page.QUESTIONS) - 1

    def test_published_tables_come_before_ours(self, full):
        text = full.read_text("utf-8")
        assert text.index("FID, published by the authors") < text.index("Ours &amp; nobody")
        assert "0.5\u00a0±\u00a00.1" in text  # never torn apart

    def test_no_path_of_this_machine(self, full, home):
        for path in full.parent.rglob("*"):
            if path.suffix in (".html", ".json", ".md"):
                assert str(home) not in path.read_text("utf-8") and "/home/" not in path.read_text("utf-8")

    def test_a_path_in_the_evidence_is_refused(self, home):
        page.save_verdicts("reports/smoke", "04_ablation", [{**VERDICTS[0], "evidence": f"see {home}/outputs"}])
        with pytest.raises(RunError, match="a path of this machine"):
            page.build("smoke")
        assert not (home / "reports/smoke/index.html").exists()

    def test_a_page_without_its_executed_notebook_stays_with_its_title(self, full):
        """A fresh clone has the pages, and no executed notebook."""
        made, kept = full.parent / "notebooks/04_ablation.ipynb", full.parent / "notebooks/04_ablation.html"
        kept.write_text(kept.read_text("utf-8").replace("<title>4. Does", "<title>4. RAT &amp; SA: does"), "utf-8")
        before = kept.read_text("utf-8")
        made.unlink()
        text = page.build("smoke").read_text("utf-8")
        assert kept.read_text("utf-8") == before
        assert '<a href="notebooks/04_ablation.html">4. RAT &amp; SA: does it help?</a>' in text
        assert '<a href="notebooks/04_ablation.html">04_ablation</a>' in text  # the answers' link
        assert "04_ablation: not run yet" not in text and "05_hidden_size_sweep: not run yet" in text
        check_links(full)

    def test_a_damaged_table_is_named(self, full):
        for text in ("nothing", "[]", '{"caption": "c"}'):
            (full.parent / "tables/measured_ablation.json").write_text(text)
            with pytest.raises(RunError, match="tables/measured_ablation.json: not a table"):
                page.build("smoke")

    def test_the_page_holds_the_whole_summary(self, full):
        text = (full.parent / "reproducibility.md").read_text("utf-8")
        section = full.read_text("utf-8").split('id="summary"')[1].split("</section>")[0]
        assert section.count("<h2>") == 1 and section.count("<h3>") == text.count("\n## ") == 6
        assert section.count("<li>") == len(re.findall(r"(?m)^- ", text))
        assert "SA &lt;helps&gt; &amp; more: undecided (+0.01 [-0.30, +0.32])" in section

    def test_no_such_report(self, home):
        with pytest.raises(RunError, match="reports/none: there is no such report"):
            page.build("smoke", report="reports/none")


class TestNotebookPage:
    def opened(self, notebook: Path) -> str:
        out = notebook.with_suffix(".html")
        assert html.notebook_page(notebook, out) == "4. Does it help?"
        return out.read_text("utf-8")

    def test_pictures_have_the_heading_as_alternative_text(self, tmp_path):
        picture(tmp_path / "p.png")
        text = self.opened(executed(tmp_path / "04.ipynb", tmp_path / "p.png"))
        assert 'alt="Figure: The pictures"' in text and "two &amp; &lt;two&gt;" in text
        assert "<title>4. Does it help?</title>" in text and "Question." in text

    def test_equations_are_mathml_with_their_tex(self, tmp_path):
        text = self.opened(executed(tmp_path / "a.ipynb"))
        assert text.count("<math") == 2 and 'alttext="x^a_i"' in text and "\\tfrac12" in text
        assert "$$" not in re.sub(r'alttext="[^"]*"', "", text)

    @pytest.mark.parametrize("tex", [r"\unheardof{x} < 1", "x_"])
    def test_unknown_tex_stays_readable(self, tex):
        shown = tex.replace("<", "&lt;")
        assert html.equation(tex, display=False) == f'<code class="tex">{shown}</code>'

    def test_an_equation_of_its_own_line_and_one_within(self):
        tex = r"\frac1n \sum_i \lVert x_i \rVert"
        assert re.search(r'class="equation"><math [^>]*display="block"', html.equation(tex, display=True))
        assert re.match(r'<math [^>]*display="inline"', html.equation(tex, display=False))
        assert "<mtext>resize</mtext>" in html.equation(r"\mathrm{resize}(x)", display=False)  # not six letters

    def test_every_equation_of_the_story_can_be_set(self):
        root = Path(__file__).resolve().parents[2] / "notebooks"
        cells = [
            cell.source
            for path in sorted(root.glob("*.ipynb"))
            for cell in nbformat.read(path, 4).cells
            if cell.cell_type == "markdown"
        ]
        found = [
            first or second
            for text in cells
            for first, second in re.findall(r"\$\$(.+?)\$\$|(?<!\$)\$([^$\n]+)\$(?!\$)", text, re.S)
        ]
        assert len(found) > 20
        drawn = {tex: html.equation(tex, display=False) for tex in found}
        assert [tex for tex, mathml in drawn.items() if not mathml.startswith("<math")] == []
        for mathml in drawn.values():
            parsed = Page(mathml)
            assert not parsed.wrong and not parsed.open

    def test_a_page_that_would_be_too_large_has_its_pictures_apart(self, tmp_path, monkeypatch):
        picture(tmp_path / "p.png", (300, 300))
        source = executed(tmp_path / "a.ipynb", tmp_path / "p.png")
        html.notebook_page(source, tmp_path / "whole.html")
        whole = (tmp_path / "whole.html").stat().st_size
        monkeypatch.setattr(html, "LIMIT", 100_000)
        html.notebook_page(source, opened := tmp_path / "a.html")
        assert opened.stat().st_size < 100_000 < whole and 'src="a_files/02_1.png"' in opened.read_text("utf-8")
        assert 'alt="Figure: The pictures"' in opened.read_text("utf-8")
        assert (tmp_path / "a_files/02_1.png").read_bytes() == (tmp_path / "p.png").read_bytes()
        monkeypatch.undo()
        html.notebook_page(source, opened)
        assert not (tmp_path / "a_files").exists()

    def test_a_damaged_notebook_is_named(self, tmp_path):
        (tmp_path / "a.ipynb").write_text("{")
        with pytest.raises(RunError, match="a.ipynb: not a readable notebook"):
            html.notebook_page(tmp_path / "a.ipynb", tmp_path / "a.html")


class TestProvenance:
    def write(self, root: Path, name: str, seconds: float) -> None:
        (root / "runs" / name).mkdir(parents=True)
        (root / "runs" / name / "provenance.json").write_text(
            json.dumps(
                {
                    "seed": 0,
                    "steps": 8,
                    "training_seconds": seconds,
                    "devices": "1 x cpu",
                    "threads": 1,
                    "commit": "ab" * 20,
                    "processor": "a processor",
                    "accelerators": [],
                }
            )
        )

    def test_runs_that_are_there_and_runs_that_are_not(self, tmp_path):
        settings = load_settings("smoke")
        self.write(tmp_path, settings.run_name, 200.4)
        found = page.provenance(settings, tmp_path, tmp_path)
        assert [row["run"] for row in found["runs"]] == [settings.run_name] and found["training_seconds"] == 200.4
        assert found["runs"][0]["variant"] == "main run = RAT + SA = h = 8 = corrected"
        assert settings.run_name not in found["missing_runs"] and len(found["missing_runs"]) > 10
        rows = page.origin(found)
        assert rows["training of all runs"].startswith("3 min 20 s (1 run;")
        assert (
            rows["hardware of the runs"] == "1 x cpu (a processor, 1 thread)"
            and "abababababab" in rows["runs made with"]
        )

    def test_files_of_the_settings_are_named_without_their_folder(self, tmp_path):
        settings = load_settings(
            "cub",
            {
                "clip.source": "file",
                "clip.path": "/somewhere/private/ViT.pt",
                "evaluation.extractor_weights": "/somewhere/private/inception.pth",
            },
        )
        found = page.provenance(settings, tmp_path, tmp_path)
        assert found["settings"]["clip"]["path"] == "ViT.pt" and "/somewhere" not in json.dumps(found)

    def test_notebooks_give_their_digest_and_their_seconds(self, tmp_path):
        executed(tmp_path / "notebooks/04_ablation.ipynb")
        found = page.provenance(load_settings("smoke"), tmp_path, tmp_path)
        assert found["notebooks"] == {"04_ablation": {"code_sha256": "ab12", "seconds": 75}}
        assert page.origin(found)["notebooks"] == "1 min 15 s (04: 1 min 15 s)"


class TestSummary:
    def made(self, tmp_path, claims, profile="smoke") -> dict[str, str]:
        """The summary's sections, each as one line of text."""
        settings = load_settings(profile)
        text = page.summary(settings, claims, page.provenance(settings, tmp_path, tmp_path))
        parts = [part.split("\n", 1) for part in text.split("\n## ")[1:]]
        return {title: " ".join(words.split()) for title, words in parts}

    def test_headings_of_the_challenge_in_their_order(self, tmp_path):
        assert list(self.made(tmp_path, [])) == [
            "Scope of reproducibility",
            "Methodology",
            "Results",
            "What was easy",
            "What was difficult",
            "Communication with original authors",
        ]

    def test_results_follow_from_the_verdicts(self, tmp_path):
        waiting = {"claim": "Is h = 64 best?", "verdict": page.OPEN, "evidence": "not run"}
        made = self.made(tmp_path, [*VERDICTS, {**VERDICTS[0], "verdict": "not measured"}, waiting])
        assert made["Results"].startswith(
            "Of 3 claims: 1 supported, 1 undecided, 1 not measured. Not answered yet: Is h = 64 best? "
        )
        first = made["Results"].split(" - ")[1]
        assert first == "RAT beats CAT: supported (+0.21 [+0.03, +0.39], 3 seeds)"
        assert made["Results"].endswith("- RAT beats CAT: not measured")
        assert "- RAT beats CAT" in made["Scope of reproducibility"]
        assert "Is h = 64 best?" not in made["Scope of reproducibility"]
        other = self.made(tmp_path, [{**VERDICTS[0], "verdict": "contradicted"}])
        assert other["Results"].startswith("Of 1 claim: 1 contradicted. ")

    def test_without_an_answer_nothing_is_claimed(self, tmp_path):
        made = self.made(tmp_path, [])
        assert made["Scope of reproducibility"].endswith("Nothing of this has been tested yet.")
        assert (
            made["Results"].startswith("No claim has been tested yet.")
            and "runs of the grid are missing" in made["Results"]
        )
        assert made["Communication with original authors"].startswith("None. ")

    def test_methodology_follows_from_the_settings(self, tmp_path):
        small, full = (self.made(tmp_path, [], name)["Methodology"] for name in ("smoke", "cub"))
        assert "8 steps of batch 8" in small and "48 generated images" in small and "not the literature's FID" in small
        assert (
            "1,500 epochs of batch 16" in full and "30,000 generated" in full and "torch-fidelity's Inception" in full
        )
        assert "at the paper's 224 px" in self.made(tmp_path, [], "cub")["Scope of reproducibility"]

    def test_no_sentence_is_torn_by_the_template(self, tmp_path):
        settings = load_settings("smoke")
        for name in ("smoke", "cub"):
            text = page.summary(load_settings(name), VERDICTS, page.provenance(settings, tmp_path, tmp_path))
            assert not re.search(r"\n{3}|[^\s-] {2}| [,.;:]|\s+$(?<!\n)", text)


@pytest.mark.parametrize(
    "seconds, shown", [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3725, "1 h 02 min")]
)
def test_duration(seconds, shown):
    assert page.duration(seconds) == shown
