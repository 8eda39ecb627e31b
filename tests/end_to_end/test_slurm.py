"""The cluster profile on a real Slurm of one node: a run that is killed goes on from its checkpoint, and is then read.

The node says that it has 16 CPUs, 200 GB and a GPU (which is /dev/null), so that the profile is used as it stands.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.xdist_group("slurm")]
ROOT = Path(__file__).resolve().parents[2]
DEFAULT = Path("/etc/slurm")  # srun inside a job does not inherit SLURM_CONF
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
CONFIGURATION = """
ClusterName=ratlip
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/pgid
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
ReturnToService=2
KillWait=2
MailProg=/bin/true
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=200000 Gres=gpu:1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
PROFILE = """
extends: smoke
training: {steps: 300, checkpoint_every: 10, log_every: 10, sample_every: 300}
experiments: {steps: 300, seeds: 1, versus_seeds: 1}
"""


def missing() -> str:
    """Why no Slurm can be started here; "" where one can."""
    if absent := [name for name in NEEDED if not shutil.which(name)]:
        return f"Slurm is not installed (no {', '.join(absent)}; on Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "Slurm is started as root"
    if not importlib.util.find_spec("snakemake_executor_plugin_slurm"):
        return "snakemake-executor-plugin-slurm is not installed (make env)"
    return f"{DEFAULT} holds a configuration" if (DEFAULT / "slurm.conf").exists() else ""


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout


def wait_for(answer, what: str, seconds: float):
    end = time.monotonic() + seconds
    while not (found := answer()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)
    return found


def stop(pid_file: Path) -> None:
    """End the daemon of this file and wait until it has gone."""
    if pid_file.is_file():
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + 20
        while Path(f"/proc/{pid}/exe").exists() and time.monotonic() < end:
            time.sleep(0.1)
        if Path(f"/proc/{pid}/exe").exists():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def slurm(tmp_path_factory):
    """A Slurm of one node, with its configuration at Slurm's default place; both go with the test."""
    if why := missing():
        pytest.skip(why)
    folder, host = tmp_path_factory.mktemp("slurm"), platform.node().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    files = {DEFAULT / "slurm.conf": CONFIGURATION.format(host=host, folder=folder)}
    files[DEFAULT / "gres.conf"] = f"NodeName={host} Name=gpu File=/dev/null\n"
    options = {"-S": "munge.socket", "--key-file": "key", "--pid-file": "munged.pid", "--seed-file": "seed"}
    munged = ["munged", "-f", "--log-file", str(folder / "munged.log")]
    munged += [word for option, name in options.items() for word in (option, str(folder / name))]
    try:
        for path, text in files.items():
            path.write_text(text)
        for command in (munged, ["slurmctld"], ["slurmd"]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
            assert done.returncode == 0, done.stderr
        wait_for(lambda: "idle" in said("sinfo", "-h", "-o", "%t"), "the node is idle", 30)
        yield folder
    finally:
        said("scancel", "--user", "root")
        for name in ("slurmctld", "slurmd", "munged"):
            stop(folder / f"{name}.pid")
        for path in files:
            path.unlink(missing_ok=True)


@pytest.fixture
def flow(smoke, tmp_path, monkeypatch):
    """(folder, plan, command of Snakemake) of a grid in a copy of the project; data and CLIPs are made."""
    from ratlip.studies import workflow

    for name in ("notebooks", "ratlip"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "mine.yaml").write_text(PROFILE)
    shutil.copytree(smoke.workspace.root, tmp_path / "outputs/mine", ignore=shutil.ignore_patterns("runs"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RATLIP_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    plan = workflow.plan("mine.yaml")
    for name in plan.made:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    command = [sys.executable, "-m", "snakemake", "--profile", str(ROOT / "env/cluster")]
    command += ["--latency-wait", "5", "--slurm-no-account", "--slurm-status-command", "squeue"]
    command += ["--slurm-init-seconds-before-status-checks", "2", "--config", "profile=mine.yaml", "data="]
    return tmp_path, workflow.plan("mine.yaml"), command


def jobs() -> dict[str, str]:
    """Job number -> what Slurm says about it, of those that wait or run."""
    found = [line for line in said("scontrol", "show", "job", "-o").splitlines() if line.startswith("JobId=")]
    alive = [line for line in found if re.search("JobState=(PENDING|RUNNING)", line)]
    return {re.search(r"JobId=(\d+)", line)[1]: line for line in alive}


def test_a_killed_run_goes_on_and_is_read(slurm, flow):
    folder, plan, command = flow
    notebook, (run,) = plan.executed["03_train"], plan.reads["03_train"]  # of the main run, which is in the grid
    kept = folder / Path(run).parent
    command += ["--", notebook]
    with open(folder / "said.txt", "w") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: (kept / "checkpoint.pt").exists() or process.poll() is not None, "a checkpoint", 90)
        ((number, about),) = jobs().items()
        assert "NumCPUs=8" in about and "gpu" in about and re.search("mem=16000M|mem=15.6", about), about
        said("scancel", number)
        wait_for(lambda: number not in jobs(), "the job is gone", 20)
        before = (kept / "metrics.jsonl").read_text().splitlines()
        (_, again), *_ = wait_for(lambda: list(jobs().items()), "the retry", 100)
        assert re.search("mem=32000M|mem=31.25G", again), again  # with more memory
        assert process.wait(timeout=200) == 0
    except BaseException:
        print((folder / "said.txt").read_text()[-6000:])
        process.kill()
        raise
    after = (kept / "metrics.jsonl").read_text().splitlines()
    assert after[: len(before) - 1] == before[:-1] and len(before) > 1  # seconds too: these steps were not made again
    assert json.loads(after[-1])["step"] == 300 and (kept / "provenance.json").is_file()
    assert Path(notebook).is_file()


def test_the_profile_asks_for_what_each_rule_needs(flow):
    """A dry run, without a Slurm: CPU rules without a GPU; it is parsed without --cores."""
    if not importlib.util.find_spec("snakemake_executor_plugin_slurm"):
        pytest.skip("snakemake-executor-plugin-slurm is not installed (make env)")
    folder, _, command = flow
    done = subprocess.run([*command, "--dry-run", "--forceall"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for block in re.split(r"\n(?=(?:local)?rule )", done.stdout + done.stderr):
        if match := re.match(r"(?:local)?rule (\w+):", block):
            found[match[1]] = ("gpu=1" in block, (re.search(r"threads: (\d+)", block) or [0, "1"])[1])
    on_gpu = {name for name, (gpu, _) in found.items() if gpu}
    assert on_gpu == {"prepare_clip", "train", "grad_cam", "paper_versus_code", "figures_and_tables"} | {"run"} & {
        *found
    }
    assert {"prepare_data", "hidden_size_sweep", "report"} <= {*found} - on_gpu
    assert found["train"][1] == "8" and found["report"][1] == "1"
