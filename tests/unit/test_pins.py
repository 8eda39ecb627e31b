"""pyproject.toml, environment.yml and env/ name the same versions, and no one machine's places."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = {"cpu": ROOT / "env/requirements-cpu.txt", "gpu": ROOT / "env/requirements-gpu.txt"}
CUDA = ("nvidia-", "cuda-", "triton")
PLACES = [
    {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": system,
        "platform_machine": machine,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[system],
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }
    for python in ("3.11", "3.12", "3.13", "3.14")
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
]
CONDA_PYTHON = "3.11"


def lines(path):
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def pins(path, place):
    """{name: version} of the lines of a lock that hold at `place`; a name must come once."""
    found = {}
    for requirement in map(Requirement, lines(path)):
        if requirement.marker is None or requirement.marker.evaluate(place):
            assert requirement.name not in found, f"{path.name}: {requirement.name} twice for {place}"
            found[requirement.name] = next(iter(requirement.specifier)).version
    return found


def direct(place):
    """The requirements of pyproject.toml, the tests' included, that hold at `place`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = map(Requirement, project["dependencies"] + project["optional-dependencies"]["test"])
    return [r for r in requirements if r.marker is None or r.marker.evaluate(place)]


@pytest.mark.parametrize("lock", LOCKS.values(), ids=LOCKS)
def test_every_line_is_a_name_a_version_and_no_place(lock):
    for line in lines(lock):
        requirement = Requirement(line)
        assert [s.operator for s in requirement.specifier] == ["=="], line
        assert not requirement.url and not requirement.extras, line
        assert requirement.name == canonicalize_name(requirement.name), line
        version = next(iter(requirement.specifier)).version
        assert "*" not in version and "+" not in version, f"{line}: a local build that others cannot have"
    for word in ("://", "--hash", "--find-links", "index-url", "file:", "@"):
        assert word not in lock.read_text(), f"{lock.name} holds {word}"


def test_the_cpu_lock_names_no_cuda_package():
    assert [line for line in lines(LOCKS["cpu"]) if line.startswith(CUDA)] == []


@pytest.mark.parametrize(
    "place", PLACES, ids=lambda p: "-".join((p["python_version"], p["sys_platform"], p["platform_machine"]))
)
def test_the_locks_agree_and_satisfy_pyproject(place):
    cpu, gpu = pins(LOCKS["cpu"], place), pins(LOCKS["gpu"], place)
    assert {name: version for name, version in gpu.items() if not name.startswith(CUDA)} == cpu
    assert any(name.startswith(CUDA) for name in gpu) == (place["sys_platform"] == "linux")
    for requirement in direct(place):
        name = canonicalize_name(requirement.name)
        assert name in cpu, f"{name} is in pyproject.toml and not locked: run env/lock.py"
        assert cpu[name] in requirement.specifier, f"{requirement} against {cpu[name]}: run env/lock.py"


def test_conda_gets_the_same_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "ratlip"
    python, _, pip = environment["dependencies"]
    assert python == f"python={CONDA_PYTHON}"
    place = next(p for p in PLACES if p["python_version"] == CONDA_PYTHON)
    locked = pins(LOCKS["cpu"], place)
    listed = [Requirement(line) for line in pip["pip"] if not line.startswith("-")]
    assert {r.name: str(r.specifier) for r in listed} == {
        name: f"=={locked[name]}" for name in (canonicalize_name(r.name) for r in direct(place))
    }
    options = [line for line in pip["pip"] if line.startswith("-")]
    assert options == ["--constraint env/requirements-cpu.txt", "-e ."]


@pytest.mark.parametrize("lock", LOCKS.values(), ids=LOCKS)
def test_the_cluster_plugin_is_pinned_with_what_its_jobs_start(lock):
    names = {Requirement(line).name for line in lines(lock)}
    assert {"snakemake-executor-plugin-slurm", "snakemake-executor-plugin-slurm-jobstep"} <= names


def test_pyproject_takes_the_oldest_pytorch_and_python_we_support():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch = next(Requirement(line) for line in project["dependencies"] if line.startswith("torch>"))
    assert "2.11.0" in torch.specifier and "2.10.0" not in torch.specifier
    assert project["requires-python"] == ">=3.11.4"


def test_the_diffusion_benchmark_needs_what_nothing_else_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = [Requirement(line) for line in project["optional-dependencies"]["diffusion"]]
    assert {r.name for r in extra} == {"diffusers", "transformers"}
    assert all({s.operator for s in r.specifier} == {">=", "<"} for r in extra), "a range with both ends"
    for lock in LOCKS.values():
        assert not {r.name for r in extra} & {Requirement(line).name for line in lines(lock)}
