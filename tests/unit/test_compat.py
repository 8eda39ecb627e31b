"""ratlip.compat: torchvision can be imported beside a CPU build of PyTorch; nothing happens elsewhere."""

import itertools
import subprocess
import sys

import pytest
import torch

from ratlip import compat

names = (f"fakevision_{number}" for number in itertools.count())


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A torchvision of another name (operators cannot be undeclared) beside a CPU build of PyTorch."""
    name = next(names)
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise AssertionError('compat must not import torchvision')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(sys, "platform", "linux")
    return tmp_path / name


def describe(name):
    """What torchvision's import does, and what fails without the declaration."""
    torch.library.register_fake(f"{name}::nms")(lambda dets, scores, iou_threshold: dets)


def test_the_import_fails_without_the_declaration(package):
    with pytest.raises(RuntimeError, match="does not exist"):
        describe(package.name)


@pytest.mark.parametrize("content", [b"not a library of this machine", None], ids=["unloadable", "absent"])
def test_operators_are_declared_where_the_extension_does_not_load(package, content):
    if content:
        (package / "_C.so").write_bytes(content)
    assert compat.apply(package.name)
    describe(package.name)
    operator = getattr(torch.ops, package.name).nms
    with pytest.raises(NotImplementedError):
        operator(torch.zeros(1, 4), torch.zeros(1), 0.5)


def test_a_second_call_does_nothing(package):
    assert compat.apply(package.name)
    assert not compat.apply(package.name)


def test_an_extension_that_loads_defines_its_own_operators(package, monkeypatch):
    (package / "_C.so").touch()
    loaded = []

    def load_library(path):
        library = torch.library.Library(package.name, "FRAGMENT")
        library.define(compat.SCHEMAS[0])
        loaded.append((path, library))

    monkeypatch.setattr(torch.ops, "load_library", load_library)
    assert not compat.apply(package.name)
    assert [path for path, _ in loaded] == [str(package / "_C.so")]
    describe(package.name)


@pytest.mark.parametrize("change", [(torch.version, "cuda", "13.0"), (sys, "platform", "darwin")])
def test_nothing_is_touched_with_cuda_or_on_another_system(package, monkeypatch, change):
    (package / "_C.so").touch()
    monkeypatch.setattr(*change)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded something"))
    assert not compat.apply(package.name)
    assert not hasattr(getattr(torch.ops, package.name), "nms")


def test_nothing_is_declared_without_torchvision(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    name = next(names)
    assert not compat.apply(name)
    assert not hasattr(getattr(torch.ops, name), "nms")


def test_after_ratlip_the_libraries_on_torchvision_can_be_imported():
    code = """
import sys
import ratlip
assert "torchvision" not in sys.modules, "ratlip imports torchvision unasked"
import torchvision, open_clip, timm, torch_fidelity, pytorch_grad_cam
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
