"""Two processes compute what one does, and end together (CPU, gloo, profile smoke)."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from ratlip.settings import load_settings
from ratlip.training.processes import SyncedBatchNorm, sync_batch_norms
from ratlip.training.session import read_checkpoint, tensors

ROOT = Path(__file__).resolve().parents[2]
# mismatches drawn over the batch, weights that are never used, norms that are made again for the backward pass
HARD = ["training.mismatch=similar", "model.unused_shortcuts=true", "training.checkpointing=true", "training.ema=0.9"]
HARD += ["training.steps=4"]  # Adam makes a step of a gradient that is all rounding: after eight, 1.3e-4 in one weight


@pytest.fixture
def start(smoke, tmp_path):
    """`start(name, devices, *settings)` starts `ratlip train` on smoke: (process, its folder of runs)."""
    started = []

    def call(name, devices, *settings):
        shutil.copytree(smoke.workspace.root, tmp_path / name, ignore=shutil.ignore_patterns("runs"))
        command = f"-m ratlip.cli train -p smoke --accelerator cpu --devices {devices} -q --out {tmp_path / name}"
        pairs = [word for setting in ("training.log_every=1", *settings) for word in ("-s", setting)]
        process = subprocess.Popen(
            [sys.executable, *command.split(), *pairs],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        started.append(process)
        return process, tmp_path / name / "runs"

    yield call
    for process in started:
        process.kill()


def trained(start, name, devices, *settings):
    process, runs = start(name, devices, *settings)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    (folder,) = runs.iterdir()
    return folder


def ended(pid):
    """Whether a process is gone, or waits for nothing but somebody who asks for its exit status."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX":
            return True
        time.sleep(0.1)
    return False


def losses(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[value for name, value in row.items() if name != "seconds"] for row in found])


def weights(folder):
    return dict(tensors(read_checkpoint(folder / "checkpoint.pt", "cpu")["networks"]))


def apart(one, other):
    """The largest difference of the losses, and of the weights, averages and statistics."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and any(name.endswith("running_var") for name in a)
    of_weights = max(float((a[name].double() - b[name].double()).abs().max()) for name in a)
    return float((losses(one) - losses(other)).abs().max()), of_weights


@pytest.mark.slow
def test_two_processes_compute_what_one_does(start):
    one, two = (trained(start, f"x{n}", n, *HARD) for n in (1, 2))
    assert one.name == two.name and losses(two)[:, 0].tolist() == [1, 2, 3, 4]
    assert json.loads((two / "provenance.json").read_text())["devices"] == "2 x cpu"
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    assert len(list((two / "tensorboard").iterdir())) == 1  # the first process alone writes
    of_losses, of_weights = apart(one, two)
    assert of_losses < 1e-4 and of_weights < 1e-4, (of_losses, of_weights)
    own = trained(start, "own", 2, *HARD, "training.sync_batch_norm=false")
    assert own.name != one.name and apart(one, own)[0] > 1e-3  # each its own part: another computation


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["other", "first"])
def test_a_process_that_is_killed_ends_the_run(start, victim):
    process, runs = start("x", 2, "training.steps=100000", "training.checkpoint_every=5")
    while not list(runs.glob("*/checkpoint.pt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    (other,) = (int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    os.kill(other if victim == "other" else process.pid, signal.SIGKILL)
    _, said = process.communicate(timeout=60)  # also until the other one has closed its end
    (folder,) = runs.iterdir()
    step = read_checkpoint(folder / "checkpoint.pt", "cpu")["step"]
    assert step >= 5 and ended(other)
    if victim == "other":
        assert process.returncode == 2 and "Traceback" not in said
        (sentence,) = (line for line in said.splitlines() if line.startswith("ratlip: "))
        assert re.search(
            rf"one of 2 processes ended \(process {other} by signal 9\); checkpoint.pt is .*good", sentence
        )


@pytest.mark.slow
@pytest.mark.parametrize("receiver", ["first", "other"])
def test_a_signal_to_one_process_ends_all_after_the_same_step(start, receiver):
    process, runs = start("x", 2, "training.steps=100000", "training.checkpoint_every=100000")
    while not (found := list(runs.glob("*/metrics.jsonl"))) or not found[0].read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    (other,) = (int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    os.kill(other if receiver == "other" else process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    (sentence,) = (line for line in said.splitlines() if line.startswith("ratlip: "))
    step = read_checkpoint(found[0].parent / "checkpoint.pt", "cpu")["step"]
    assert process.returncode == 143 and f"SIGTERM: stopped after step {step} of 100000" in sentence
    assert step % 8 == 0 and ended(other) and "Traceback" not in said


def test_the_synced_norm_is_the_library_s(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain, synced = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
        sync_batch_norms(synced)
        assert type(synced) is SyncedBatchNorm
        x, grad = torch.randn(4, 5, 3, 3) * 3 + 1, torch.randn(4, 5, 3, 3)
        found = []
        for norm in (plain, synced):
            nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
            given = x.clone().requires_grad_()
            y = norm(given)
            y.backward(grad)
            found.append([y, given.grad, norm.weight.grad, norm.bias.grad, *norm.buffers(), norm.eval()(x)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    finally:
        distributed.destroy_process_group()


def test_the_setting_names_another_run_only_where_it_is_off():
    default, on, off = (
        load_settings("smoke", o).run_hash
        for o in ({}, {"training.sync_batch_norm": True}, {"training.sync_batch_norm": False})
    )
    assert default == on != off
