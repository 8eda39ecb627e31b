"""How notebooks are executed, tidied, kept and planned (`ratlip.report.notebooks`), and their order (Snakefile)."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ratlip.errors import RunError, SettingsError
from ratlip.files import outputs_folder, repository
from ratlip.report import notebooks, warm
from ratlip.settings import load_settings
from ratlip.studies import grid, workflow
from ratlip.workspace import Workspace, open_workspace

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, *sources: str) -> Path:
    cells = [new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    notebook = new_notebook(cells=[new_markdown_cell("# Why?"), *cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    return path


@pytest.mark.parametrize("inside", [".", "notebooks", "tests/notebooks"])
def test_outputs_are_found_from_the_root_whatever_the_current_folder(monkeypatch, inside):
    monkeypatch.chdir(ROOT / inside)
    monkeypatch.delenv("RATLIP_OUTPUTS", raising=False)
    assert repository() == ROOT
    assert outputs_folder("demo") == ROOT / "outputs" / "demo"
    assert outputs_folder("mine/tiny.yaml") == ROOT / "outputs" / "tiny"
    assert outputs_folder("demo", "elsewhere") == ROOT / "elsewhere"


class TestWorkspace:
    def test_none_and_empty_keep_what_the_profile_says(self, tmp_path):
        plain = open_workspace("smoke", tmp_path).settings
        same = open_workspace("smoke", tmp_path, settings=None, conditioning=None, seed="", steps=None).settings
        assert same == plain

    def test_parameters_reach_their_settings(self, tmp_path):
        workspace = open_workspace(
            "smoke", tmp_path, conditioning="cat", attention="none", seed=3, steps=5, settings={"training.ema": 0.5}
        )
        s = workspace.settings
        assert (s.model.conditioning, s.model.attention, s.seed, s.training.steps, s.training.ema) == (
            "cat",
            "none",
            3,
            5,
            0.5,
        )
        assert workspace.root == tmp_path

    @pytest.mark.parametrize("given", ["clip.steps=7 model.hidden_size=16", ["clip.steps=7", "model.hidden_size=16"]])
    def test_further_settings_as_text_or_list(self, tmp_path, given):
        s = open_workspace("smoke", tmp_path, settings=given).settings
        assert (s.clip.steps, s.model.hidden_size) == (7, 16)

    def test_a_wrong_value_is_named(self, tmp_path):
        with pytest.raises(SettingsError, match="model.conditioning='rta'"):
            open_workspace("smoke", tmp_path, conditioning="rta")


class TestTidy:
    def test_progress_bars_keep_their_last_state(self):
        assert notebooks._last_states("\r  0%\r 50%\r100%\nnext\r\nlast\r\n") == "100%\nnext\nlast\n"

    def test_a_path_is_hidden_whole_or_not_at_all(self):
        hide = {"/home/me/runs": "<outputs>", "/home/me/": ""}
        assert notebooks._masked("/home/me/runs/a /home/me/runs.yaml", hide) == "<outputs>/a runs.yaml"

    def test_paths_papermill_and_widgets_go(self):
        cell = new_code_cell(
            "data = '/home/me/birds'", metadata={"tags": ["injected-parameters"], "papermill": {"x": 1}}
        )
        cell.outputs = [
            new_output("stream", name="stdout", text="a\r"),
            new_output("stream", name="stdout", text="/home/me/birds/b"),
        ]
        notebook = new_notebook(cells=[cell], metadata={"papermill": {"input_path": "/x"}, "widgets": {}})
        tidied = notebooks.tidy(notebook, {"/home/me/birds": "<data>"})
        assert tidied.cells[0].source == "data = '<data>'" and tidied.cells[0].metadata == {
            "tags": ["injected-parameters"]
        }
        assert [output.text for output in tidied.cells[0].outputs] == ["<data>/b"]
        assert set(tidied.metadata) == {"ratlip", "kernelspec", "language_info"}
        assert notebooks.injected(tidied) == {"data": "<data>"}


@pytest.mark.slow
class TestExecute:
    def test_writes_the_executed_notebook_and_says_so(self, tmp_path, capsys):
        source = write(tmp_path / "a.ipynb", "x = 1", "import os; print(x, os.path.basename(os.getcwd()))")
        out = notebooks.execute(source, tmp_path / "out" / "a.ipynb", {"x": 5})
        assert nbformat.read(out, 4).cells[-1].outputs[0].text == "5 notebooks\n"
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in lines] == [["a", "started"], ["a", "done"]]

    def test_a_failure_leaves_the_cells_so_far_under_another_name(self, tmp_path):
        source = write(tmp_path / "a.ipynb", "x = 1", "print('so far')", "1 / 0", "print('never')")
        with pytest.raises(
            RunError, match=r"(?s)a stopped at the cell\n    1 / 0\n.*ZeroDivisionError.*a.failed.ipynb"
        ):
            notebooks.execute(source, tmp_path / "out" / "a.ipynb", {"x": 5}, talk=False)
        assert os.listdir(tmp_path / "out") == ["a.failed.ipynb"]
        assert "so far" in (tmp_path / "out" / "a.failed.ipynb").read_text()

    @pytest.mark.parametrize("out, shown", [("runs/rat-seed0/03_train.ipynb", "rat-seed0"), ("out/a.ipynb", "a")])
    def test_lines_name_the_run_or_the_notebook(self, tmp_path, capsys, out, shown):
        notebooks.execute(write(tmp_path / "a.ipynb", "x = 1"), tmp_path / out, {})
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [shown, shown]

    def test_a_misspelt_parameter(self, tmp_path):
        source = write(tmp_path / "a.ipynb", "x = 1  # a comment\nprofile = None")
        with pytest.raises(RunError, match="a.ipynb: has no parameter profil; its parameters are x, profile"):
            notebooks.execute(source, tmp_path / "out.ipynb", {"profil": "smoke", "x": 2})
        assert not (tmp_path / "out.ipynb").exists()

    def test_no_such_notebook(self, tmp_path):
        with pytest.raises(RunError, match="no such notebook"):
            notebooks.execute(tmp_path / "b.ipynb", tmp_path / "out.ipynb", {})


def tensors(run: Path) -> dict:
    """Every tensor of a run's checkpoint, as bytes, by its place."""
    import torch

    found = {}

    def walk(where: str, value) -> None:
        if isinstance(value, torch.Tensor):
            found[where] = value.numpy().tobytes()
        for key, each in (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        ):
            walk(f"{where}/{key}", each)

    walk("", torch.load(run / "checkpoint.pt", weights_only=True))
    return found


def shown(run: Path) -> list:
    """The outputs of a run's notebook, without those that name times."""
    cells = [cell for cell in nbformat.read(run / "03_train.ipynb", 4).cells if cell.cell_type == "code"]
    return [cell.outputs for cell in cells if "nbval-ignore-output" not in cell.metadata.get("tags", [])]


@pytest.fixture(scope="module")
def server():
    with warm.server(OMP_NUM_THREADS="1") as number:
        yield number


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="no safe fork")
@pytest.mark.xdist_group("warm")
class TestWarm:
    """Programs and kernels that are forks of one server (`ratlip.report.warm`)."""

    @pytest.fixture(autouse=True)
    def one_thread(self, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def test_a_kernel_is_a_fork_and_nothing_goes_over_to_the_next(self, server, tmp_path):
        ask = "import os, sys; print(os.getppid(), 'left' in dir(sys)); sys.left = True"
        source = write(tmp_path / "a.ipynb", "x = 1", ask)
        for name in ("first", "second"):
            out = notebooks.execute(source, tmp_path / f"{name}.ipynb", {}, talk=False)
            assert nbformat.read(out, 4).cells[-1].outputs[0].text == f"{server} False\n"

    def test_with_other_threads_it_is_a_program_of_its_own(self, server, tmp_path, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        source = write(tmp_path / "a.ipynb", "x = 1", "import os; print(os.getppid() == " + f"{server})")
        out = notebooks.execute(source, tmp_path / "out.ipynb", {}, talk=False)
        assert nbformat.read(out, 4).cells[-1].outputs[0].text == "False\n"

    def test_status_output_and_folder_are_those_of_a_program(self, server, tmp_path):
        program = [sys.executable, warm.__file__, "profiles"]
        with_server = subprocess.run([*program, "smoke"], cwd=tmp_path, capture_output=True, text=True)
        alone = {key: value for key, value in os.environ.items() if key != warm.ADDRESS}
        without = subprocess.run([*program, "smoke"], cwd=tmp_path, capture_output=True, text=True, env=alone)
        assert with_server.stdout == without.stdout != "" and with_server.returncode == without.returncode == 0
        wrong = subprocess.run([*program, "smok"], cwd=tmp_path, capture_output=True, text=True)
        assert wrong.returncode == 2 and "smok" in wrong.stderr

    def test_whoever_kills_the_program_kills_the_fork(self, server, tmp_path):
        note = tmp_path / "pid"
        cell = f"import os, time; open({str(note)!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(600)"
        source = write(tmp_path / "a.ipynb", "x = 1", cell)
        program = [sys.executable, warm.__file__, "notebook", "run", source, "--out", tmp_path / "out.ipynb"]
        job = subprocess.Popen(program, stdout=subprocess.DEVNULL)
        until(lambda: note.is_file() and note.read_text().endswith("\n"))
        kernel = Path("/proc") / note.read_text().strip()
        assert kernel.exists()
        job.kill()
        job.wait()
        until(lambda: not kernel.exists())
        assert not (tmp_path / "out.ipynb").exists()

    def test_a_kernel_that_was_killed_is_an_error(self, server, tmp_path):
        source = write(tmp_path / "a.ipynb", "x = 1", "import os; os.kill(os.getpid(), 9)")
        with pytest.raises(RunError, match="out.ipynb: the kernel of a was killed"):
            notebooks.execute(source, tmp_path / "out.ipynb", {}, talk=False)

    def test_a_run_is_the_same_whatever_ran_before_and_a_failed_one_stops_no_other(self, server, tmp_path, monkeypatch):
        few = {"experiments.seeds": 1, "experiments.hidden_sizes": [0, 4], "experiments.steps": 2}
        lane = Workspace.of(load_settings("smoke", few), tmp_path / "lane", progress=False)
        first, second = grid.plan(lane.settings, "sweep")
        assert lane.prepared and lane.clip and lane.judge and lane.independent
        shutil.copytree(lane.root, tmp_path / "alone")
        torn = first.folder(lane.root) / "checkpoint.pt"
        torn.parent.mkdir(parents=True)
        torn.write_bytes(b"torn")
        with pytest.raises(RunError, match=f"1 of 2 runs failed, 1 are done; the same command goes on\n{first.name}"):
            grid.complete(lane, "sweep")
        assert second.complete(lane.root) and not (first.folder(lane.root) / "03_train.ipynb").exists()
        before, _ = second.folder(lane.root).stat().st_mtime_ns, shutil.rmtree(torn.parent)
        assert grid.complete(lane, "sweep") == []
        assert second.folder(lane.root).stat().st_mtime_ns == before

        monkeypatch.delenv(warm.ADDRESS)
        monkeypatch.setattr(warm, "server", contextlib.nullcontext)
        alone = Workspace.of(lane.settings, tmp_path / "alone", progress=False)
        grid.train_missing(alone, [second], "papermill")
        ours, theirs = (second.folder(each.root) for each in (lane, alone))
        assert tensors(ours) == tensors(theirs) and len(tensors(ours)) > 100
        assert shown(ours) == shown(theirs) and len(shown(ours)) > 10
        scores = [json.loads((each / "scores.json").read_text()) for each in (ours, theirs)]
        assert [each.pop("seconds_per_image") > 0 for each in scores] == [True, True]
        assert scores[0] == scores[1]


def until(there) -> None:
    for _ in range(600):
        if there():
            return
        time.sleep(0.1)
    raise AssertionError("waited a minute")


class TestPlan:
    @pytest.fixture
    def changed(self, tmp_path, monkeypatch):
        """Which notebooks a change of a profile makes run again."""
        monkeypatch.setenv("RATLIP_OUTPUTS", str(tmp_path / "outputs"))
        profile, before = tmp_path / "mine.yaml", {}

        def after(text: str) -> list[str]:
            profile.write_text("extends: smoke\n" + text)
            now = workflow.plan(str(profile)).depends
            new = [name for name, digest in now.items() if before.get(name) != digest]
            before.update(now)
            runs = ["runs"] if any(name not in notebooks.STORY for name in new) else []
            return [name for name in new if name in notebooks.STORY] + runs

        return after

    def test_only_what_depends_on_a_change_runs_again(self, changed):
        late = [name for name in notebooks.STORY if name >= "04"]
        assert changed("") == [*notebooks.STORY, "runs"]
        assert changed("") == []
        assert changed("training: {steps: 9}") == ["03_train", "08_figures_and_tables"]
        main = "training: {steps: 9}\n"
        assert changed(main + "experiments: {steps: 9}") == [*late, "runs"]
        published = ["07_paper_versus_code", "08_figures_and_tables"]
        assert changed(main + "experiments: {steps: 9, versus_seeds: 4}") == [*published, "runs"]
        assert changed(main + "experiments: {steps: 9}") == published
        study = "evaluation: {study: [24]}\n"
        assert changed(main + study + "experiments: {steps: 9}") == ["08_figures_and_tables"]
        clip = "clip: {steps: 21}\n"
        assert changed(main + study + clip + "experiments: {steps: 9}") == [*notebooks.STORY[1:], "runs"]
        assert changed("data: {train_images: 200}") == [*notebooks.STORY, "runs"]

    def test_data_that_are_needed_and_not_given(self, monkeypatch, tmp_path):
        monkeypatch.setenv("RATLIP_OUTPUTS", str(tmp_path))
        with pytest.raises(SettingsError, match="make reproduce PROFILE=cub DATA=ROOT"):
            workflow.plan("cub")
        with pytest.raises(SettingsError, match="no such folder"):
            workflow.plan("cub", str(tmp_path / "nowhere"))


def test_a_fresh_clone_makes_everything_though_the_page_came_with_it(tmp_path):
    """reports/ holds the committed page, figures and tables; outputs/ and the executed notebooks are not there."""
    page = tmp_path / "reports/smoke/index.html"
    page.parent.mkdir(parents=True)
    page.write_text("made elsewhere")
    for name in ("Snakefile", "notebooks", "ratlip", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "-n", "--config", "profile=smoke", "data="]
    environment = {key: value for key, value in os.environ.items() if key != "RATLIP_OUTPUTS"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    jobs = dict(line.split() for line in (done.stdout + done.stderr).splitlines() if re.match(r"[a-z_]+ +\d+$", line))
    runs = len(workflow.plan("smoke").runs)
    assert jobs["run"] == str(runs) and jobs["prepare_clip"] == jobs["train"] == jobs["report"] == "1"


def snakemake(folder: Path, outputs: Path, *options: str) -> list[str]:
    """Names of the rules of the jobs that Snakemake would run, in its order."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--nolock", "--quiet", "progress"]
    command += ["--rerun-triggers", "mtime", "params", *options]
    env = {**os.environ, "PATH": path, "RATLIP_OUTPUTS": str(outputs)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return [line.split()[1].rstrip(":") for line in said.splitlines() if line.startswith(("rule ", "localrule "))]


@pytest.mark.slow
def test_snakemake_runs_the_notebooks_in_order(tmp_path):
    order = snakemake(ROOT, tmp_path, "--dry-run", "--forceall", "--config", "profile=smoke", "data=")
    first, middle, last = order[:2], order[2:-2], order[-2:]
    assert (first, last) == (["prepare_data", "prepare_clip"], ["report", "all"]), order
    runs = len(grid.unique(grid.plan(load_settings("smoke"))))
    assert middle.count("run") == runs and middle.count("train") == 1, order
    assert {"ablation", "hidden_size_sweep", "grad_cam", "paper_versus_code", "figures_and_tables"} < {*middle}


@pytest.mark.slow
def test_snakemake_makes_again_what_depends_on_a_change_and_nothing_else(tmp_path, monkeypatch):
    """The files are empty: `--touch` lets Snakemake believe that it has made them."""
    for name in ("Snakefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("notebooks", "ratlip"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    profile, outputs, page = tmp_path / "mine.yaml", tmp_path / "outputs", tmp_path / "reports/mine/index.html"
    page.parent.mkdir(parents=True)
    page.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RATLIP_OUTPUTS", str(outputs))

    def again(text: str = "", *options: str) -> set[str]:
        profile.write_text("extends: smoke\n" + text)
        return {*snakemake(tmp_path, outputs, *options, "--config", f"profile={profile}", "data=")} - {"all", "report"}

    late = {"ablation", "hidden_size_sweep", "grad_cam", "paper_versus_code", "figures_and_tables"}
    everything = {"prepare_data", "prepare_clip", "train", "run", *late}
    assert again("", "--dry-run") == everything  # a page that came with git hides nothing
    plan = workflow.plan(str(profile))
    for path in [*plan.made, *plan.executed.values()]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    again("", "--touch", "--forceall")
    assert again("", "--dry-run") == set()
    assert again("experiments: {versus_seeds: 4}", "--dry-run") == {"run", "paper_versus_code", "figures_and_tables"}
    assert again("evaluation: {study: [24]}", "--dry-run") == {"figures_and_tables"}
    assert again("clip: {steps: 21}", "--dry-run") == everything - {"prepare_data"}
    assert again("data: {train_images: 200}", "--dry-run") == everything
    notebook = tmp_path / "notebooks/01_prepare_data.ipynb"
    notebook.write_text(notebook.read_text("utf-8").replace('"# ', '"# New: ', 1), "utf-8")
    assert again("", "--dry-run") == {"prepare_data"}
    assert again("evaluation: {study: [24]}", "--dry-run") == {"prepare_data", "figures_and_tables"}


def test_refresh_refuses_a_report_of_other_parameters(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "repository", lambda: tmp_path)
    monkeypatch.setattr(notebooks, "STORY", ("01_a",))
    for folder in ("notebooks", "reports/demo/notebooks"):
        (tmp_path / folder).mkdir(parents=True)
    write(tmp_path / "notebooks/01_a.ipynb", "seed = 0", "print(seed)")
    with pytest.raises(RunError, match="run `make reproduce PROFILE=demo` first"):
        notebooks.refresh("demo")
    made = nbformat.read(write(tmp_path / "reports/demo/notebooks/01_a.ipynb", "seed = 0", "print(seed)"), 4)
    made.cells.insert(2, new_code_cell("seed = 3", metadata={"tags": ["injected-parameters"]}))
    nbformat.write(made, tmp_path / "reports/demo/notebooks/01_a.ipynb")
    with pytest.raises(RunError, match="was run with {'seed': 3}"):
        notebooks.refresh("demo")
    made.cells[2].source = 'profile = "demo"\nreport = "reports/demo"'
    made.cells[3].outputs = [new_output("stream", name="stdout", text="0\n")]
    nbformat.write(made, tmp_path / "reports/demo/notebooks/01_a.ipynb")
    stored = nbformat.read(notebooks.refresh("demo")[0], 4)
    assert [cell.source for cell in stored.cells] == ["# Why?", "seed = 0", "print(seed)"]
    assert [cell.execution_count for cell in stored.cells[1:]] == [1, 2] and stored.cells[2].outputs
