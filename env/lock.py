"""Remake env/requirements-cpu.txt and env/requirements-gpu.txt from pyproject.toml.

    pip install uv
    python env/lock.py              # keeps every pin that still fits
    python env/lock.py --upgrade    # takes the newest of everything
    make test                       # tests/unit/test_pins.py: the files agree

Both locks hold the same versions for Python 3.11 and newer; the GPU lock adds the CUDA packages of PyTorch's
Linux build, which the CPU lock leaves to whatever build of PyTorch pip finds.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# What torch 2.13 needs apart from CUDA. uv would otherwise read the CUDA packages from the metadata.
CPU_SETTINGS = """
[[dependency-metadata]]
name = "torch"
requires-dist = ["filelock", "typing-extensions>=4.10.0", "setuptools>=77.0.3", "sympy>=1.13.3",
                 "networkx>=2.5.1", "jinja2", "fsspec>=0.8.5"]
"""


def lock(name, settings, *options):
    """Resolve into env/requirements-<name>.txt; the comment lines at its head stay."""
    target = HERE / f"requirements-{name}.txt"
    head = [line for line in target.read_text().splitlines() if line.startswith("#")]
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch, "uv.toml")
        config.write_text(settings)
        subprocess.run(
            [
                *("uv", "pip", "compile", "pyproject.toml", "--all-extras"),
                *("--universal", "--python-version", "3.11", "--config-file", config),
                *("--no-annotate", "--no-header", "--quiet", "--output-file", target, *options),
            ],
            cwd=HERE.parent,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    pins = sorted(line for line in target.read_text().splitlines() if line and not line.startswith("#"))
    target.write_text("\n".join([*head, *pins]) + "\n")


if __name__ == "__main__":
    lock("cpu", CPU_SETTINGS, *sys.argv[1:])
    lock("gpu", "", "-c", "env/requirements-cpu.txt", *sys.argv[1:])
