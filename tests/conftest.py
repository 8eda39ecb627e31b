"""Fixtures for all tests: one thread, the shared real data where it is, and one small finished run."""

import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ratlip as _ratlip  # noqa: F401  (before open_clip and torch-fidelity: it makes torchvision importable)

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, beside the checkout or where RATLIP_SHARED points."""
    folder = Path(os.environ.get("RATLIP_SHARED") or ROOT.parent / "shared")
    if not (folder / "data").is_dir():
        pytest.skip("the shared data are not here (set RATLIP_SHARED to their folder)")
    return folder


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory):
    """Unpack a tar of the shared data once a session; a function (shared folder, name) -> dataset root."""
    roots = {}

    def unpack(shared, name):
        if name not in roots:
            archive = shared / "data" / f"{name}.tar"
            if not archive.is_file():
                pytest.skip(f"{archive.name} is not there")
            roots[name] = tmp_path_factory.mktemp(name)
            with tarfile.open(archive) as tar:
                tar.extractall(roots[name], **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        return roots[name] / name

    return unpack


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> SimpleNamespace:
    """The profile `smoke` up to the scores: `workspace` (Workspace), `settings`, `run` (folder), `scores`.

    Tests read it; one that writes takes a folder of its own (`tmp_path`).
    """
    from ratlip.settings import load_settings
    from ratlip.workspace import Workspace

    settings = load_settings("smoke")
    workspace = Workspace.of(settings, tmp_path_factory.mktemp("smoke"), progress=False)
    run = workspace.train(accelerator="cpu")
    return SimpleNamespace(workspace=workspace, settings=settings, run=run, scores=workspace.evaluate())


@pytest.fixture
def ratlip(capsys, monkeypatch):
    """`ratlip(*arguments)` -> (exit status, what it printed, what it said on stderr), in this process."""
    from ratlip import cli

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["ratlip", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capsys.readouterr()
        return caught.value.code or 0, printed.out, printed.err

    return call
