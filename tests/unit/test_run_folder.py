"""A run folder: one writer at a time, logs that never run backwards, nothing that is not finite, scores at visits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric

from ratlip import files
from ratlip.errors import BusyError, RunError
from ratlip.networks.losses import DiscriminatorLoss, GeneratorLoss
from ratlip.scores import evaluation
from ratlip.settings import load_settings
from ratlip.studies import grid
from ratlip.training import generation, log, loop, session
from ratlip.training.session import read_checkpoint
from ratlip.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
QUIET = {"training.sample_every": 1000}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def train(smoke, tmp_path):
    """`train(name, overrides, **options)` trains smoke into a folder of that name."""

    def call(name, overrides=None, **options):
        settings = load_settings("smoke", {**QUIET, **(overrides or {})})
        given = (smoke.workspace.prepared, smoke.workspace.clip, smoke.workspace.sentences(), tmp_path / name)
        return loop.train(settings, *given, **{"accelerator": "cpu", "progress": False, **options})

    return call


def rows(folder, name="metrics.jsonl"):
    path = folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(folder, name="metrics.jsonl"):
    return [row["step"] for row in rows(folder, name)]


def weights(folder):
    return read_checkpoint(folder / "checkpoint.pt", "cpu")["networks"]


def assert_same_weights(one, other):
    a, b = (dict(session.tensors(weights(folder))) for folder in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --------------------------------------------------------------------------------------------- one writer

HOLD = "import sys, time; from ratlip import files\nwith files.one_writer(sys.argv[1]):\n"


@pytest.fixture
def holder():
    """`holder(folder)` -> another process that is the folder's writer until it is killed."""
    started = []

    def call(folder):
        command = [sys.executable, "-c", f"{HOLD}    print('here', flush=True); time.sleep(600)", str(folder)]
        job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT)
        started.append(job)
        assert job.stdout.readline() == "here\n"
        return job

    yield call
    for job in started:
        job.kill()
        job.wait()
        job.stdout.close()


def test_the_second_writer_is_told_who_the_first_is_and_a_killed_one_loses_the_folder(holder, tmp_path):
    first = holder(tmp_path / "run")
    since = json.loads((tmp_path / "run" / "writer.json").read_text())["since"]
    with pytest.raises(BusyError) as caught, files.one_writer(tmp_path / "run"):
        pytest.fail("two writers")
    who = f"process {first.pid} on {os.uname().nodename}, since {since}"
    assert f"{tmp_path / 'run'}: is being written by {who}; wait until it has ended, or stop it" in str(caught.value)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with files.one_writer(tmp_path / "run") as still_ours:
        still_ours()
        assert json.loads((tmp_path / "run" / "writer.json").read_text())["process"] == os.getpid()
        with pytest.raises(RunError, match=f"process {os.getpid()} on"), files.one_writer(tmp_path / "run"):
            pytest.fail("two writers in one process")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_writer_that_another_machine_took_the_folder_from_stops(tmp_path):
    with pytest.raises(RunError, match="was taken over by process 7 on elsewhere; this process ends"):
        with files.one_writer(tmp_path) as still_ours:
            other = {"process": 7, "machine": "elsewhere", "since": "today"}
            files.write_json(tmp_path / "writer.json", other)
            still_ours()
    assert files.read_json(tmp_path / "writer.json") == other  # the other one's note stays
    with pytest.warns(UserWarning, match="taken over from process 7 on elsewhere, which began at today"):
        with files.one_writer(tmp_path) as still_ours:
            still_ours()


def test_an_error_gives_the_folder_back(tmp_path):
    with pytest.raises(KeyError), files.one_writer(tmp_path):
        raise KeyError
    with files.one_writer(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file/run: cannot be written"), files.one_writer(tmp_path / "file/run"):
        pass


def test_a_second_scoring_ends_with_one_sentence(smoke, holder, ratlip, tmp_path):
    root = shutil.copytree(smoke.workspace.root, tmp_path / "out")
    first = holder(root / "runs" / smoke.run.name)
    before = (root / "runs" / smoke.run.name / "scores.json").read_bytes()
    status, _, said = ratlip("evaluate", "-p", "smoke", "-q", "--out", root)
    assert status == 2 and f"is being written by process {first.pid} on" in said and "Traceback" not in said
    assert (root / "runs" / smoke.run.name / "scores.json").read_bytes() == before
    assert not list((root / "runs" / smoke.run.name).glob("evaluation-*"))


@pytest.mark.slow
def test_two_trainings_of_one_folder_give_one_log(smoke, train, tmp_path):
    """The first is held in the middle by SIGSTOP, the second refused, the first killed: the next one takes over."""
    root = shutil.copytree(smoke.workspace.root, tmp_path / "out", ignore=shutil.ignore_patterns("runs"))
    own = {"training.steps": 60, "training.checkpoint_every": 5, "training.log_every": 1}
    folder = root / "runs" / load_settings("smoke", own).run_name
    pairs = [part for key, value in {**QUIET, **own}.items() for part in ("-s", f"{key}={value}")]
    command = [sys.executable, "-m", "ratlip.cli", "train", "-p", "smoke", "--accelerator", "cpu", "-q", *pairs]
    command += ["--out", str(root)]
    first = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    try:
        metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 240
        while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= 7):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        first.send_signal(signal.SIGSTOP)
        before = metrics.read_bytes()
        second = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
        assert second.returncode == 2 and len(second.stderr.strip().splitlines()) == 1
        assert f"{folder}: is being written by process {first.pid} on" in second.stderr
        assert metrics.read_bytes() == before
    finally:
        first.kill()
        first.wait()
    assert not loop.is_complete(folder)
    train(folder, own)
    assert steps(folder) == list(range(1, 61)) and loop.is_complete(folder)
    assert_same_weights(folder, train("whole", own))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("failed writing file")])
def test_a_checkpoint_that_the_disk_does_not_take_leaves_the_one_before(train, tmp_path, monkeypatch, error):
    save = torch.save

    def refuses(content, path):
        save(content, path)
        if content["step"] == 8:
            raise error

    with monkeypatch.context() as patch, pytest.raises(RunError) as caught:
        patch.setattr(torch, "save", refuses)
        train("run")
    assert "checkpoint.pt: not written at step 8 (" in str(caught.value) and "free disk space" in str(caught.value)
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt", "cpu")["step"] == 4
    assert not list((tmp_path / "run").glob(".*"))
    assert_same_weights(train("run"), train("whole"))


def test_what_a_killed_one_left_is_swept(train, tmp_path):
    folder = train("run", end=0.0)
    left = [folder / ".checkpoint.pt.abcd_123", folder / "samples/.step-000008.png.abcd_123"]
    stays = [folder / ".mine", folder / ".identity.json.abcd_123", folder / "samples/step-000001.png"]
    for each in [*left, *stays]:
        each.mkdir(parents=True)
    train("run")
    assert not any(each.exists() for each in left) and all(each.exists() for each in stays)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\0"])
def test_an_empty_or_damaged_provenance_is_no_complete_run(train, content):
    folder = train("run")
    (folder / "provenance.json").write_text(content)
    assert not loop.is_complete(folder)
    assert loop.is_complete(train("run")) and json.loads((folder / "provenance.json").read_text())["steps"] == 8


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"summary: 3\n", b"a: 1\n"])
def test_a_damaged_config_is_an_error(train, content):
    folder = train("run", end=0.0)
    kept = (folder / "config.yaml").read_bytes()
    (folder / "config.yaml").write_bytes(content)
    with pytest.raises(RunError, match="config.yaml: damaged; delete it, and the same command writes it again"):
        train("run")
    (folder / "config.yaml").write_bytes(kept.replace(b"seed: 0", b"seed: 7"))
    with pytest.raises(RunError, match="config.yaml: holds other settings"):
        train("run")
    (folder / "config.yaml").unlink()
    assert (train("run") / "config.yaml").read_bytes() == kept


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_says_where_to_go_on(smoke, train, tmp_path, number, status):
    root = shutil.copytree(smoke.workspace.root, tmp_path / "out", ignore=shutil.ignore_patterns("runs"))
    own = {"training.steps": 60, "training.checkpoint_every": 1000, "training.log_every": 1}
    folder = root / "runs" / load_settings("smoke", own).run_name
    pairs = [part for key, value in {**QUIET, **own}.items() for part in ("-s", f"{key}={value}")]
    command = [sys.executable, "-m", "ratlip.cli", "train", "-p", "smoke", "--accelerator", "cpu", "-q", *pairs]
    job = subprocess.Popen([*command, "--out", str(root)], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (folder / "metrics.jsonl").is_file() or not steps(folder):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    job.send_signal(number)
    said = job.communicate(timeout=240)[1]
    step = read_checkpoint(folder / "checkpoint.pt", "cpu")["step"]
    assert job.returncode == status and steps(folder)[-1] == step < 60
    line = f"ratlip: {folder}: {number.name}: stopped after step {step} of 60, which is saved; the same command goes on"
    assert said.strip().splitlines()[-1] == line and "Traceback" not in said
    assert not list(folder.glob(".*")) and not (folder / "writer.json").exists()
    train(folder, own)
    assert_same_weights(folder, train("whole", own))


def test_a_second_signal_acts_at_once():
    with pytest.raises(KeyboardInterrupt), files.stop_signals() as came:
        signal.raise_signal(signal.SIGINT)
        assert came == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
    with files.stop_signals() as came:
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and not came


def test_one_changed_bit_of_a_checkpoint_is_an_error(train):
    path = train("run", end=0.0) / "checkpoint.pt"
    weight, content = weights(path.parent)["generator"]["to_rgb.weight"], bytearray(path.read_bytes())
    content[content.index(weight.numpy().tobytes()) + 6] ^= 1
    path.write_bytes(content)
    found = torch.load(path, weights_only=True)["networks"]["generator"]["to_rgb.weight"]
    assert int((found != weight).sum()) == 1  # torch does not look at the checksums
    with pytest.raises(RunError, match=r"checkpoint.pt: not a readable checkpoint \(.* changed since it was written\)"):
        train("run")


# --------------------------------------------------------------------------------------------------- logs


def test_a_log_is_cut_back_to_the_checkpoint(train):
    folder = train("run", {"training.log_every": 1, "training.checkpoint_every": 3}, end=0.0)
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in (1, 2, 5)) + '{"step": 6, "d_re')
    train("run", {"training.log_every": 1})
    assert steps(folder) == list(range(1, 9))


@pytest.mark.parametrize(
    "text", ['{"step": 1}\n{"step": 1}\n', '{"step": 2}\n{"step": 1}\n', '{"st\n', "[1]\n", "{}\n"]
)
def test_a_log_that_runs_backwards_or_is_damaged_is_named(train, text):
    folder = train("run", end=0.0)
    (folder / "metrics.jsonl").write_text(text)
    with pytest.raises(RunError, match=r"metrics.jsonl: line [12] is no row, or of a step before the last one"):
        train("run")


# ------------------------------------------------------------------------------------------------- finite


def test_the_known_case_stops_at_its_first_step(train, tmp_path):
    with pytest.raises(RunError, match="stopped at step 1, where .*g_logit is nan.*; nothing is kept"):
        train("run", {"model.bridge_scale": 1e30})
    assert not (tmp_path / "run" / "checkpoint.pt").exists() and not rows(tmp_path / "run")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(smoke, train, tmp_path, monkeypatch, value):
    """At step 8, where a checkpoint is due: the one of step 4 stays, and goes on to what a whole run gives."""
    step = loop.training_step

    def spoilt(run, batch):
        loss_d, loss_g = step(run, batch)
        wrong = torch.tensor(value if run.step == 8 else 1.0)
        return DiscriminatorLoss(loss_d.real, loss_d.mismatch, wrong, loss_d.penalty, loss_d.total + wrong), loss_g

    with monkeypatch.context() as patch, pytest.raises(RunError) as caught:
        patch.setattr(loop, "training_step", spoilt)
        train("run", {"training.log_every": 1})
    assert f"stopped at step 8, where d_fake is {value}; checkpoint.pt is of before and good" in str(caught.value)
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt", "cpu")["step"] == 4
    assert steps(tmp_path / "run") == list(range(1, 8)) and not loop.is_complete(tmp_path / "run")
    generation.load_generator(tmp_path / "run", smoke.settings, smoke.workspace.clip)
    assert_same_weights(train("run"), train("whole"))


def losses(**wrong):
    """Both losses, all terms 1 but those given."""
    values = {"real": 1.0, "mismatch": 1.0, "fake": 1.0, "penalty": 1.0, "total": 1.0, "logit": 1.0, "similarity": 1.0}
    found = {name: torch.tensor(value) for name, value in {**values, **wrong}.items()}
    of_d = [found[name] for name in ("real", "mismatch", "fake", "penalty", "total")]
    return DiscriminatorLoss(*of_d), GeneratorLoss(*(found[name] for name in ("logit", "similarity", "total")))


def test_the_first_step_is_named_where_the_device_is_not_waited_for(monkeypatch, tmp_path):
    noted = log.Losses(Fabric(accelerator="cpu", devices=1), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(log.Losses, "check", lambda self: None)  # as on a GPU, between two rows of the log
        for step, wrong in enumerate(({}, {"penalty": float("inf")}, {"real": float("nan")}, {}), start=1):
            noted.note(step, *losses(**wrong))
    with pytest.raises(RunError, match="stopped at step 2, where d_penalty is inf; nothing is kept"):
        noted.check()
    assert list(noted.row()) == [*(f"d_{n}" for n in ("real", "mismatch", "fake", "penalty", "total"))] + [
        *(f"g_{n}" for n in ("logit", "similarity", "total"))
    ]


def test_a_total_is_named_where_it_alone_is_not_finite(tmp_path):
    noted = log.Losses(Fabric(accelerator="cpu", devices=1), tmp_path)
    with pytest.raises(RunError, match="where d_total is inf, g_total is inf; "):
        noted.note(1, *losses(total=float("inf")))


@pytest.mark.parametrize("spoilt", ["weight", "moment"])
def test_weights_that_are_not_finite_are_not_saved(train, tmp_path, monkeypatch, spoilt):
    step = loop.training_step

    def spoils(run, batch):
        found = step(run, batch)
        weight = run.networks["generator"].to_rgb.weight
        moments = run.optimiser_g.optimizer.state[weight]
        if run.step == 8:
            (weight.data if spoilt == "weight" else moments["exp_avg_sq"]).fill_(float("inf"))
        return found

    monkeypatch.setattr(loop, "training_step", spoils)
    named = "networks.generator.to_rgb.weight" if spoilt == "weight" else r"optimisers.generator.state.\d+.exp_avg_sq"
    with pytest.raises(RunError, match=rf"checkpoint.pt: not written at step 8, where not finite: {named}"):
        train("run", {"training.ema": 0})
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt", "cpu")["step"] == 4


def test_results_are_finite_or_an_error(tmp_path):
    path = tmp_path / "scores.json"
    files.write_json(path, {"kept": 1.0})
    wrong = {"a": {"b": [1.0, float("nan")]}, "c": float("inf"), "d": 2}
    with pytest.raises(RunError, match=r"scores.json: not written, .* not finite: a.b.1=nan, c=inf"):
        files.write_json(path, wrong)
    assert files.read_json(path) == {"kept": 1.0}


def test_a_generator_that_draws_no_numbers_is_not_scored(smoke, tmp_path):
    folder = shutil.copytree(smoke.run, tmp_path / "runs" / "run")
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    content["networks"]["average"]["module.to_rgb.weight"].fill_(float("nan"))
    torch.save(content, folder / "checkpoint.pt")
    with pytest.raises(RunError, match="run: its generator draws pixels that are not finite"):
        evaluation.evaluate(folder, smoke.settings, smoke.workspace.prepared, smoke.workspace.clip, progress=False)


# ------------------------------------------------------------------------------------------------- visits

VISITED = {"training.visits": [2, 5, 8], "training.log_every": 1}


@pytest.fixture
def visited(train):
    """`visited(name, stops=None)` trains with three visits -> (folder, steps of the checkpoints that were scored)."""
    seen = []

    def call(name, stops=None, overrides=None, **options):
        def score(folder):
            state = read_checkpoint(folder / "checkpoint.pt", "cpu")
            if state["step"] == stops:
                raise KeyboardInterrupt
            seen.append(state["step"])
            torch.rand(3)  # what a scoring draws must not move the training
            return {"sum": float(sum(w.double().sum() for w in state["networks"]["average"].values()))}

        return train(name, overrides or VISITED, **{"visit": score, **options}), seen

    return call


def test_visits_leave_the_training_as_it_is(train, visited):
    with_visits, seen = visited("with")
    assert_same_weights(with_visits, train("without", {"training.log_every": 1}))
    assert seen == steps(with_visits, "visits.jsonl") == [2, 5, 8]
    plain = train("five", {"training.steps": 5})
    expected = float(sum(w.double().sum() for w in weights(plain)["average"].values()))
    assert rows(with_visits, "visits.jsonl")[1] == {"step": 5, "sum": expected}
    assert load_settings("smoke", VISITED).run_hash == load_settings("smoke").run_hash


@pytest.mark.parametrize("stops", [2, 5, 8])
def test_a_visit_that_was_killed_is_made_up_for_once(visited, tmp_path, stops):
    whole, _ = visited("whole")
    with pytest.raises(KeyboardInterrupt):
        visited("run", stops)
    assert steps(tmp_path / "run", "visits.jsonl") == [step for step in (2, 5) if step < stops]
    folder, _ = visited("run")
    assert (folder / "visits.jsonl").read_bytes() == (whole / "visits.jsonl").read_bytes()
    assert_same_weights(folder, whole)


def test_a_row_past_the_checkpoint_is_scored_again(visited, tmp_path):
    whole, _ = visited("whole")
    folder, _ = visited("run", overrides={**VISITED, "training.steps": 8}, end=0.0)
    (folder / "visits.jsonl").write_text('{"step": 2, "sum": 99.0}\n{"step": 5, "su')
    visited("run")
    assert (folder / "visits.jsonl").read_bytes() == (whole / "visits.jsonl").read_bytes()


def test_a_visit_that_is_past_is_an_error(visited, train):
    folder = train("run")
    with pytest.raises(RunError, match="run: was not scored at the steps 2, 5, 8, which it has passed; delete"):
        visited("run")
    (folder / "provenance.json").unlink()
    with pytest.raises(RunError, match="was not scored at the steps 2, 5, which it has passed"):
        visited("run")
    later, _ = visited("later", overrides={"training.visits": [8, 900]})
    assert steps(later, "visits.jsonl") == [8]
    assert visited("later", overrides={"training.visits": [8, 900]})[0] == later


def test_visits_that_nobody_scores_are_the_callers_mistake(train):
    with pytest.raises(ValueError, match="give visit="):
        train("run", VISITED)


def test_a_visit_is_no_training_time(monkeypatch):
    now = iter([100.0, 103.0, 130.0, 131.0])  # begins at 99; pauses from 100 to 103; asked at 130
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: next(now)))
    run = session.Session.__new__(session.Session)
    run._earlier, run._clock = 10.0, 99.0
    with run.paused():
        pass
    assert run.seconds == 10 + (130 - 99) - 3


def test_a_workspace_scores_at_visits_as_it_does_at_the_end(smoke, tmp_path):
    root = shutil.copytree(smoke.workspace.root, tmp_path / "out", ignore=shutil.ignore_patterns("runs"))
    workspace = Workspace.of(load_settings("smoke", {**QUIET, "training.visits": [4, 8]}), root, progress=False)
    folder = workspace.train(accelerator="cpu")
    four, eight = rows(folder, "visits.jsonl")
    assert (four["step"], eight["step"]) == (4, 8) and four != {**eight, "step": 4}
    scores = workspace.evaluate()
    assert eight["judge.object"] == scores["judge"]["object"] and eight["judge_all"] == scores["judge_all"]
    for name in ("frechet_distance", "independent_similarity", "recall", "images"):
        assert eight[name] == scores[name] == smoke.scores[name]
    assert not [name for name in eight if name.startswith(("real", "chance", "seconds"))]
    assert_same_weights(folder, smoke.run)
    run = grid.Experiment("RAT", "ablation", 0, workspace.settings)
    assert run.complete(root) and not run.complete(smoke.workspace.root)  # there, it was not scored on its way
    assert grid.training_log(workspace, run, "visits.jsonl")["step"].tolist() == [4, 8]
    for text, said in {"": "missing or empty", '{"step": 4}\n{"st\n': "line 2 is no row"}.items():
        (folder / "visits.jsonl").write_text(text)
        with pytest.raises(RunError, match=f"visits.jsonl: {said}"):
            grid.training_log(workspace, run, "visits.jsonl")


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b"[1]\n", b"null\n", b'{"step": "8"}\n', b'{"step": [9]}\n', b"{}\n"])
def test_a_row_that_is_none_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 4}\n' + line)
    with pytest.raises(RunError, match="metrics.jsonl: line 2 is no row"):
        log.read_rows(path)
