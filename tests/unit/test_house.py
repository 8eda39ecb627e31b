"""The floor plan holds: layers, no circle of imports, no file too long; one formatter; types are checked."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ratlip"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# What may import what: a room's modules import from rooms before it, or from its own.
FOUNDATION = ("cache", "compat", "errors", "files", "progress", "provenance", "published")
LAYERS = ("settings", "data", "clip", "networks", "fast", "training", "scores", "workspace", "studies", "cli")
LOW = {  # modules that stand lower than their room: they know PyTorch, or arrays, and nothing of ours above that
    **dict.fromkeys(
        ("plots.style", "plots.pictures", "fast.tower", "fast.maps", "fast.memory", "fast.products"), "data"
    )
}


def imports(path: Path) -> set[str]:
    """Modules of ratlip that a file imports anywhere but under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & MODULES.keys()


# Without `ratlip` itself, which opens runs for those who import it, and rooms whose door is a docstring alone.
EMPTY = {name for name, path in MODULES.items() if path.name == "__init__.py" and not imports(path)} | {"ratlip"}
GRAPH = {name: imports(path) - {name} - EMPTY for name, path in MODULES.items() if name not in EMPTY}


def layer(module: str) -> int:
    parts = module.split(".")[1:]
    if parts[0] in FOUNDATION:
        return -1
    room = {"plots": "studies", "report": "studies", "commands": "cli"}.get(parts[0], parts[0])
    return LAYERS.index(LOW.get(".".join(parts), room))


def test_there_is_no_circle_of_imports():
    order: dict[str, int] = {}
    while len(order) < len(GRAPH):
        free = [name for name in GRAPH if name not in order and GRAPH[name] <= order.keys()]
        assert free, f"a circle among {sorted(GRAPH.keys() - order.keys())}"
        order |= dict.fromkeys(free, len(order))


def test_lower_rooms_never_import_upper_ones():
    wrong = [
        f"{name} imports {other}" for name, others in GRAPH.items() for other in others if layer(other) > layer(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_house_is_small():
    lines = {path: len(path.read_text().splitlines()) for path in MODULES.values()}
    assert not {path.name: count for path, count in lines.items() if count > 400}
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 10, "at most ten files directly in ratlip/"
    others = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix in (".yaml", ".j2", ".md")]
    assert sum(lines.values()) + sum(len(path.read_text().splitlines()) for path in others) <= 17_500


@pytest.mark.parametrize("command", ["ruff format --check .", "ruff check .", "mypy"])
def test_one_formatter_and_checked_types(command):
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-1000:]}"
