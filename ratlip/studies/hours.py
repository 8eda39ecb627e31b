"""What a grid would cost before any of it is run: trainings, steps, and hours from step times that were measured.

Only a step of the same profile and batch size counts, of `reports/performance.json`; where none was measured on a GPU,
that is said, and no number is made up from another card, size or batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from ratlip.files import read_json, repository
from ratlip.settings import Settings
from ratlip.studies.grid import Experiment
from ratlip.training.loop import total_steps


def forecast(settings: Settings, runs: Sequence[Experiment], root: Path, path: str | Path | None = None) -> list[str]:
    """Sentences about `runs`, those left of the grid of `settings` in the workspace `root`. `path`: the measurement."""
    if not runs:
        return []
    batch, profile = settings.training.batch_size, settings.profile
    of_each = [steps(run.settings, root) for run in runs]
    if any(each is None for each in of_each):
        return [f"{len(runs)} trainings left; how many steps an epoch has is known once the data are prepared"]
    total, found = sum(each or 0 for each in of_each), measured(profile, batch, path)
    lines = [f"{len(runs)} trainings left, {total:,} steps"]
    for device, seconds in found.items():
        lines.append(f"{total * seconds / 3600:.3g} hours of {device}: {seconds:.3g} s a step, scores not counted")
    if not any(device.startswith("GPU") for device in found):
        command = f"ratlip bench --profile {profile} --batch {batch} --accelerator cuda --report FILE.json"
        lines.append(f"GPU hours: unknown, no step of {profile} at batch {batch} was measured on a GPU (`{command}`)")
    return lines


def steps(settings: Settings, root: Path) -> int | None:
    """Of one run; None where the budget is in epochs and the data are not prepared below `root`."""
    if settings.training.steps is not None:
        return settings.training.steps
    manifest = root / f"prepared-{settings.data_hash}" / "manifest.json"
    return total_steps(settings, read_json(manifest)["counts"]["train"]) if manifest.is_file() else None


def measured(profile: str, batch: int, path: str | Path | None = None) -> dict[str, float]:
    """Device ("GPU (its name)", "a processor, 2 threads") -> median seconds of a step of `profile` in its fast form."""
    file = Path(path) if path else repository() / "reports/performance.json"
    found: dict[str, list[float]] = {}
    for section in read_json(file)["sections"].values() if file.is_file() else ():
        cards = ", ".join(section["environment"]["accelerators"] or [])
        for each in section["cases"]:
            case = each["case"]
            same = case["kind"] == "steps" and case["form"] == "fast" and not case.get("settings")
            if not same or (case["profile"], case["batch"]) != (profile, batch) or "seconds" not in each["found"]:
                continue
            on_gpu = cards and case["accelerator"] != "cpu"
            where = f"GPU ({cards})" if on_gpu else f"{section['environment']['processor']}, {case['threads']} threads"
            found.setdefault(where, []).append(each["found"]["seconds"]["median"])
    return {where: median(values) for where, values in found.items()}
