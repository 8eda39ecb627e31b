"""`make reproduce`: what was typed reaches the workflow as it is, and a lock in the way is named."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAY = '#!/bin/sh\nprintf "%s\\n%s\\n" "$RATLIP_PROFILE" "$RATLIP_DATA"\n'


@pytest.fixture
def make(tmp_path):
    """`make(*words, **variables)` -> profile and data as the workflow's process has them; nothing is installed."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name, text in {"env/venv.sh": "", ".venv/bin/python": SAY}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".venv/bin/python").chmod(0o755)

    def call(*words, target="reproduce", **variables):
        env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "RATLIP_"))}
        command = ["make", "-s", target, *words]
        done = subprocess.run(command, cwd=tmp_path, env=env | variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return call


@pytest.mark.parametrize(
    "path", ["$$(touch F)", "`touch F`", "$(shell touch F)", "; touch F", "/a b/{c}/\"q'$x", "12", "a: b", "--n", "ü"]
)
def test_any_path_travels_as_it_is_and_is_no_command(make, tmp_path, path):
    assert make(f"DATA={path}", f"PROFILE={path}") == [path, path]
    assert make(DATA=path, PROFILE="demo") == ["demo", path]
    assert f"PROFILE={path} DATA={path}" in "\n".join(make(f"DATA={path}", f"PROFILE={path}", target="help"))
    assert not (tmp_path / "F").exists()


def test_without_words_the_demo_is_made(make):
    assert make() == ["demo", ""]


WAIT = 'rule all:\n    output: "made"\n    shell: "echo here; while [ ! -f go ]; do sleep 0.05; done; touch made"\n'


@pytest.fixture
def reproduce(tmp_path):
    """`reproduce()` starts Snakemake as make does, on one rule that waits for the file `go`."""
    (tmp_path / "Snakefile").write_text(WAIT)
    started = []

    def call(module="ratlip.report.reproduce"):
        command = [sys.executable, "-m", module, "--cores", "1", "--quiet", "all", "--rerun-incomplete"]
        env, pipe = {**os.environ, "PYTHONPATH": str(ROOT)}, subprocess.PIPE
        job = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=pipe, stdout=pipe, text=True)
        started.append(job)
        return job

    yield call
    (tmp_path / "go").touch()
    for job in started:
        job.kill()
        job.communicate()


def wait_for(job, locks):
    deadline = time.monotonic() + 120
    while not (locks.is_dir() and any(locks.iterdir())):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_second_one_is_told_who_works_and_a_killed_one_is_taken_over_from(reproduce, tmp_path):
    locks = tmp_path / ".snakemake/locks"
    first = reproduce()
    wait_for(first, locks)
    second = reproduce()
    said = second.communicate(timeout=120)[1]
    assert second.returncode == 2 and len(said.strip().splitlines()) == 1
    assert f"is being written by process {first.pid} on" in said and "the same command then goes on" in said
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert any(locks.iterdir())  # what it left would stop every later one
    (tmp_path / "go").touch()
    third = reproduce()
    said = third.communicate(timeout=120)[1]
    assert third.returncode == 0 and (tmp_path / "made").exists(), said


@pytest.mark.slow
def test_a_lock_of_another_snakemake_stays_and_is_named(reproduce, tmp_path):
    locks = tmp_path / ".snakemake/locks"
    first = reproduce("snakemake")
    wait_for(first, locks)
    second = reproduce()
    said = second.communicate(timeout=120)[1]
    assert second.returncode == 1 and "locks: a Snakemake that make did not start works here, or was killed" in said
    assert any(locks.iterdir()) and first.poll() is None
