"""The notebooks as they lie in the repository: complete, short, true to their code, no trace of a machine."""

import itertools
import re
from pathlib import Path

import nbformat
import pytest

from ratlip.report import notebooks

ROOT = Path(__file__).resolve().parents[2]
REFERENCES = ROOT / "tests" / "notebooks" / "smoke"
STORED = [ROOT / "notebooks" / f"{name}.ipynb" for name in notebooks.STORY]
ALL = [*STORED, *(REFERENCES / path.name for path in STORED)]
MACHINE = re.compile(r"(?<![\w.~])/(home|root|Users|tmp|work|mnt|scratch|private|var)/|[A-Z]:\\\\")
EXEMPT = (
    "workspace.prepare(",
    "workspace.clip",
    "workspace.judge",
    "workspace.train(",
    "workspace.evaluate(",
    "training_seconds",
    "grid.complete(",
    "grad_cam.sweep(",
    "cost.generation(",
    "cost.table(",
    "cost.against_diffusion(",
    "performance.stored(",
    "protocol.study(",
    "bench.run(",
)  # progress and timings


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}/{path.stem}")
class TestNotebook:
    def test_is_valid_and_was_run_from_top_to_bottom_without_an_error(self, path):
        notebook = nbformat.read(path, 4)
        nbformat.validate(notebook)
        assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
        outputs = [output for cell in code(notebook) for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error"]
        assert not [output.text for output in outputs if output.get("name") == "stderr"]

    def test_outputs_are_those_of_the_code_that_stands_there(self, path):
        notebook = nbformat.read(path, 4)
        assert notebook.metadata["ratlip"]["code_sha256"] == notebooks.code_digest(notebook)
        silent = [cell.source for cell in code(notebook) if "print(" in cell.source and not cell.outputs]
        assert not silent

    def test_holds_no_path_of_a_machine_and_no_widget(self, path):
        notebook = nbformat.read(path, 4)
        assert not MACHINE.search(re.sub(r'"image/png": "[^"]*"', "", path.read_text(encoding="utf-8")))
        assert "widgets" not in notebook.metadata and "papermill" not in notebook.metadata
        assert "widget-view" not in path.read_text(encoding="utf-8")

    def test_only_progress_and_timings_are_exempt_from_comparison(self, path):
        for cell in code(nbformat.read(path, 4)):
            assert not re.search(r"NBVAL|PYTEST_VALIDATE", cell.source)
            if "nbval-ignore-output" in cell.metadata.get("tags", []):
                assert any(words in cell.source for words in EXEMPT), cell.source


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
class TestStory:
    def test_opens_with_its_question_and_ends_with_its_answer(self, path):
        cells = nbformat.read(path, 4).cells
        assert cells[0].cell_type == "markdown" and re.match(r"# \d\. .*\?\n", cells[0].source)
        assert "**Question.**" in cells[0].source and "$$" in cells[0].source
        assert "## Answer" in cells[-2].source and cells[-1].outputs

    def test_first_code_cell_holds_the_parameters(self, path):
        notebook = nbformat.read(path, 4)
        assert code(notebook)[0].metadata["tags"] == ["parameters"]
        assert not notebooks.injected(notebook)
        assert 'profile = "demo"' in code(notebook)[0].source

    def test_cells_are_short_and_prose_comes_first(self, path):
        notebook = nbformat.read(path, 4)
        for cell in code(notebook):
            assert len(cell.source.splitlines()) < 15, cell.source
            bodies = re.findall(r"^def .*:\n((?:    .*\n?)+)", cell.source, re.MULTILINE)
            assert all(len(body.splitlines()) <= 2 for body in bodies), cell.source
            assert "optimi" not in cell.source
        for first, second in itertools.pairwise(notebook.cells):
            if "## " in first.source and first.cell_type == "markdown":
                assert second.cell_type == "code"

    def test_reference_of_nbval_has_the_same_cells(self, path):
        reference = nbformat.read(REFERENCES / path.name, 4)
        assert notebooks.injected(reference) == {"profile": "smoke"}
        expected = [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in nbformat.read(path, 4).cells]
        found = [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in notebooks.own_cells(reference)]
        assert found == expected, "run `ratlip notebook smoke` and look at what changed"
