"""Nothing is loaded that is not used: each path in a process of its own, and the libraries that it does without."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ratlip.report import card

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
COMPILER = {"torch._dynamo", "torch._inductor", "sympy"}  # half of what the others below cost, and what they share
PRETRAINED = COMPILER | {"open_clip", "torchvision", "timm", "transformers", "huggingface_hub"}
TRAINING = COMPILER | {"lightning_fabric", "tensorboard", "torch.utils.tensorboard", "datasets"}
SCORES = COMPILER | {"torch_fidelity", "torchvision", "pytorch_grad_cam", "sklearn"}
NOTEBOOK_TOOLS = {"papermill", "nbformat", "nbconvert", "jinja2", "requests", "pooch"}
TABLES = {"pandas", "pyarrow", "scipy", "seaborn", "matplotlib.pyplot"}
ALL = PRETRAINED | TRAINING | SCORES | NOTEBOOK_TOOLS | TABLES
COMMAND = "from ratlip import cli\ncli.main()"
RED = "a large red ring on the left on a white background"


def loaded(code: str, names: set[str], *arguments: object) -> set[str]:
    """Which of the modules `names` are loaded after `code` in a fresh process, even where it exits."""
    whole = f"import atexit, json, sys\natexit.register(lambda: print(json.dumps([*sys.modules])))\n{code}"
    words = [sys.executable, "-c", whole, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
    return names & {*json.loads(done.stdout.splitlines()[-1])}


def test_ratlip_itself_loads_nothing():
    assert not loaded("import ratlip", ALL | {"torch", "numpy", "matplotlib", "pydantic", "typer", "rich", "tqdm"})


@pytest.mark.parametrize("words", ["--help", "generate --help", "profiles"])
def test_help_does_not_wait_for_arrays(words):
    assert not loaded(COMMAND, ALL | {"torch", "numpy", "matplotlib", "PIL"}, *words.split())


@pytest.mark.parametrize("named", [True, False])
def test_a_picture_needs_torch_and_an_image_writer(smoke, tmp_path, monkeypatch, named):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "smoke").symlink_to(smoke.workspace.root)
    monkeypatch.setenv("RATLIP_OUTPUTS", str(tmp_path / "outputs"))  # where the main run is found
    which = ["--run", smoke.run] if named else []
    arguments = ["generate", RED, *which, "-n", 2, "-o", tmp_path / "grid.png", "--device", "cpu"]
    assert not loaded(COMMAND, ALL, *arguments)
    assert (tmp_path / "grid.png").stat().st_size > 1000


@pytest.mark.parametrize("packed", [False, True])
def test_an_opened_run_needs_no_figures(smoke, tmp_path, packed):
    run = card.export(smoke.run, tmp_path / "packed") if packed else smoke.run
    code = f"import ratlip\nprint(ratlip.load(sys.argv[1], device='cpu').generate({RED!r}).shape)"
    assert not loaded(code, ALL | {"matplotlib"}, run)


@pytest.mark.parametrize("number", range(1, 9))
def test_the_first_cell_of_a_notebook_loads_what_every_notebook_uses(number):
    """The cell of the imports, without IPython's own lines. All notebooks use pandas and the charts' libraries."""
    (path,) = NOTEBOOKS.glob(f"{number:02d}_*.ipynb")
    cells = [cell["source"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"][:2]
    code = "".join(line for cell in cells for line in [*cell, "\n"] if not line.startswith("%"))
    assert "import" in code
    assert not loaded(code, ALL - TABLES), f"the first cell of {path.stem}"
