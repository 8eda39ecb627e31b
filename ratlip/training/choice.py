"""Which model draws where none was named: the newest complete main run, else one that came along."""

from __future__ import annotations

from pathlib import Path

from ratlip.errors import RunError
from ratlip.files import outputs_folder, read_json, repository, shown
from ratlip.settings import load_settings, profile_names
from ratlip.training.portable import CONFIG, WEIGHTS

CAME_ALONG = "reports/*/models/*"


def default_model() -> Path:
    """A run folder or an exported one. RunError, with what to do, where there is neither."""
    if runs := main_runs():
        return runs[-1]
    if models := came_along():
        return models[0]
    raise RunError(
        f"no model was named (--run), no main run is complete in {shown(outputs_folder('demo').parent)}, and none came "
        f"along in {CAME_ALONG}: `make reproduce` or `ratlip train` trains one; or give --run with a run folder, a "
        "folder made by `ratlip export`, or hf://owner/name"
    )


def main_runs() -> list[Path]:
    """The complete main run of each profile in outputs/, the newest last.

    A profile that comes with ratlip says how its main run is called; of one's own, it is the longest run, and the
    newest of those.
    """
    found: list[tuple[float, Path]] = []
    places = {outputs_folder("demo").parent, Path("outputs").absolute()}  # `ratlip train` writes below where it is
    for home in sorted(path for place in places for path in place.glob("*") if (path / "runs").is_dir()):
        ends = [path for path in home.glob("runs/*/provenance.json") if (path.parent / "checkpoint.pt").is_file()]
        if home.name in profile_names():
            name = load_settings(home.name).run_name
            ends = [path for path in ends if path.parent.name == name]
        if ends:
            last = max(ends, key=lambda path: (read_json(path)["steps"], path.stat().st_mtime))
            found.append((last.stat().st_mtime, last.parent))
    return [folder for _, folder in sorted(found)]


def came_along() -> list[Path]:
    """Exported models of the checkout, the one with the most captions drawn right (by its own record) first."""
    there = [path for path in repository().glob(CAME_ALONG) if all((path / n).is_file() for n in (CONFIG, WEIGHTS))]
    share = {path: read_json(path / CONFIG).get("scores", {}).get("judge_all", 0) for path in there}
    return sorted(there, key=lambda path: (-share[path], path.name))
