"""nbval runs each reference notebook (profile smoke) from nothing and compares its outputs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ratlip.report.notebooks import STORY

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("notebooks")]


def environment(**more) -> dict:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """Where the notebooks write; the data are there, so that notebooks 02 to 08 do not depend on the test of 01."""
    folder = tmp_path_factory.mktemp("outputs")
    command = [sys.executable, "-m", "ratlip.cli", "prepare", "-p", "smoke", "--out", str(folder / "smoke"), "-q"]
    subprocess.run(command, check=True, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    return folder


def nbval(*arguments: str, cwd: Path, outputs: Path) -> subprocess.CompletedProcess:
    """Run every cell of a notebook and compare what it prints with what is stored."""
    options = "--nbval --nbval-current-env -p no:xdist -p no:cacheprovider -q --color=no".split()
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments],
        cwd=cwd,
        env=environment(RATLIP_OUTPUTS=str(outputs)),
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def runs(outputs) -> None:
    """The grid of runs, which notebooks 04 to 08 read."""
    code = "from ratlip.studies import workflow; workflow.smoke_runs()"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(RATLIP_OUTPUTS=str(outputs)))


@pytest.mark.parametrize("name", STORY)
def test_every_output_is_as_stored(name, outputs, request):
    if name >= "04":
        request.getfixturevalue("runs")
    done = nbval(f"tests/notebooks/smoke/{name}.ipynb", cwd=ROOT, outputs=outputs)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


def test_a_wrong_output_is_noticed(tmp_path, outputs):
    text = (ROOT / "tests/notebooks/smoke/01_prepare_data.ipynb").read_text(encoding="utf-8")
    assert "192 training and 48 test images" in text
    wrong = tmp_path / "wrong.ipynb"
    wrong.write_text(
        text.replace("192 training and 48 test images", "191 training and 48 test images"), encoding="utf-8"
    )
    done = nbval("--rootdir", str(tmp_path), str(wrong), cwd=tmp_path, outputs=outputs)
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout[-6000:]
