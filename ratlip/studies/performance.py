"""The measured performance of this suite on one machine: `reports/performance.json`, section by section.

Every case is a fresh process (`studies.alone`), and is written down as soon as it is there, so that a section that was
stopped goes on where it was. Ratios are of cases that ran one after the other, a range is that over such pairs.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import linregress

from ratlip.errors import RunError, SettingsError
from ratlip.files import read_json, repository, write_json
from ratlip.progress import bar
from ratlip.provenance import describe
from ratlip.settings import load_settings
from ratlip.studies import alone, diffusion
from ratlip.studies.bench import FORMS, spread

FILE = "reports/performance.json"
OURS = "RATLIP"
ROUNDS = 3  # pairs of processes
GIB = (24, 80)  # of a GPU's memory, where the fit is read off
REFERENCE = "float32, the default"
OPTIONS: dict[str, dict[str, Any]] = {  # name -> form, precision or settings of `training`
    REFERENCE: {},
    "float32, the plain form": {"form": "plain"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "checkpointing": {"options": ["checkpointing"]},
    "channels_last": {"options": ["channels_last"]},
    "cached_features": {"options": ["cached_features"]},
    "bf16-mixed, channels_last": {"precision": "bf16-mixed", "options": ["channels_last"]},
    "bf16-mixed, checkpointing": {"precision": "bf16-mixed", "options": ["checkpointing"]},
    "checkpointing, cached_features": {"options": ["checkpointing", "cached_features"]},
    "bf16-mixed, checkpointing, cached_features": {
        "precision": "bf16-mixed",
        "options": ["checkpointing", "cached_features"],
    },
}
HIDDEN, SIDES = (16, 64, 256, 1024), {"train": (1, 2, 4), "other": (4 / 7, 1, 10 / 7, 2)}  # sides: of the profile's


@dataclass(frozen=True)
class Plan:
    """What is measured: a profile's sizes, `batch` images a step, drawn in `counts`, on `threads` and a device."""

    profile: str = "cub"
    batch: int = 4
    counts: tuple[int, ...] = (1, 8)
    threads: int | None = None
    accelerator: str = "auto"
    rounds: int = 3  # measured steps of a process
    demo: str = "demo"

    def case(self, kind: str, **more: Any) -> dict[str, Any]:
        """A case of `studies.alone` at these sizes."""
        base = {"profile": self.profile, "batch": self.batch, "form": "fast", "rounds": self.rounds}
        threads = self.threads or torch.get_num_threads()
        return {"kind": kind, **base, "threads": threads, "accelerator": self.accelerator, **more}

    def forms(self) -> Iterable[dict]:
        """Plain and fast in turn: steps, then drawing."""
        for number in range(ROUNDS):
            for kind in ("steps", "drawing"):
                for form in FORMS:
                    drawn = {"counts": self.counts, "kinds": ("generation", "evaluation")} if kind == "drawing" else {}
                    yield self.case(kind, form=form, turn=number, **drawn)

    def parts(self) -> Iterable[dict]:
        """Where a step's time goes: at these sizes, and the demo's on one thread, there also plain and fast in turn."""
        demo = {"profile": self.demo, "batch": load_settings(self.demo).training.batch_size, "threads": 1}
        for number in range(ROUNDS):
            for form in FORMS:
                yield self.case("steps", form=form, turn=number, **demo | {"rounds": 7 * self.rounds, "warm": 3})
        yield self.case("parts", **demo | {"rounds": 7 * self.rounds})
        yield self.case("parts")

    def options(self) -> Iterable[dict]:
        """Each option and combination: steps, memory, deviation."""
        for name, changed in OPTIONS.items():
            settings = {f"training.{option}": True for option in changed.get("options", ())}
            same: dict[str, Any] = {
                "form": changed.get("form", "fast"),
                "precision": changed.get("precision", "32-true"),
            }
            same["rounds"] = min(self.rounds, 2)
            same["warm"] = 1 + ("training.cached_features" in settings)  # two batches: all images are visited by then
            yield self.case("steps", name=name, settings=self.still() | settings, **same)

    def still(self) -> dict[str, Any]:
        """Settings under which a visit of an image is like the one before, as `cached_features` needs it."""
        return {"data.resize": load_settings(self.profile).data.crop}

    def growth(self) -> Iterable[dict]:
        """Batch, side and h, one at a time."""
        settings = load_settings(self.profile)
        source, side = settings.clip.source, settings.model.image_size
        first = {"model.hidden_size": settings.model.hidden_size or HIDDEN[1]}
        fewer = {"rounds": min(self.rounds, 2)}
        for batch in (self.batch // 2, self.batch, 2 * self.batch, 4 * self.batch):
            yield self.case("steps", settings=first, changes="batch", value=batch, **fewer | {"batch": batch})
        for size in [round(side * share) for share in SIDES.get(source, SIDES["other"])]:
            cut = dict.fromkeys(("model.image_size", "data.crop", "data.resize"), size)
            yield self.case("steps", settings=first | cut, changes="image_size", value=size, **fewer)
        for size in HIDDEN:
            yield self.case("steps", settings={"model.hidden_size": size}, changes="hidden_size", value=size, **fewer)

    def diffusion(self) -> Iterable[dict]:
        """The generator from words, and a diffusion model at its own size and near ours, at each batch size."""
        diffusion.libraries()
        for count in self.counts:
            for form in FORMS:
                yield self.case("drawing", form=form, counts=[count], kinds=["words"])
        for side in diffusion.SIDES:
            for count in self.counts:
                whole = count == min(self.counts) and side == min(diffusion.SIDES)
                case = {"profile": "", "form": "", "batch": count, "side": side, "whole": whole, "rounds": 1}
                yield self.case("denoising", **case)


SECTIONS: dict[str, Callable[[Plan], Iterable[dict]]] = {
    "forms": Plan.forms,
    "parts": Plan.parts,
    "options": Plan.options,
    "growth": Plan.growth,
    "diffusion": Plan.diffusion,
}


def chosen(sections: Sequence[str]) -> list[str]:
    """The names themselves, or all of `SECTIONS` where none is given. SettingsError for one that is not there."""
    if unknown := set(sections) - set(SECTIONS):
        raise SettingsError(f"--section {', '.join(sorted(unknown))}: should be one of {', '.join(SECTIONS)}")
    return list(sections or SECTIONS)


def run(
    path: str | Path, plan: Plan, sections: Sequence[str] = (), again: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Measure what is missing of `sections` (all) into the JSON file `path`; -> its content.

    A section that is complete stays, unless `again`; one that was stopped goes on where commit, processor and threads
    are those it began with, and begins anew otherwise.
    """
    found = read_json(path) if Path(path).is_file() else {"sections": {}}
    for name in chosen(sections):
        section = found["sections"].get(name)
        if again or not section or not section["complete"]:
            cases = list(SECTIONS[name](plan))
            here = {**describe(), "threads": plan.case("")["threads"], "bf16_instructions": bf16_instructions()}
            if again or not section or not _same(section["environment"], here):
                section = {"complete": False, "environment": here, "seconds": 0.0, "cases": []}
            found["sections"][name] = section
            done = {_key(each["case"]) for each in section["cases"]}
            for each, seconds in _measured([case for case in cases if _key(case) not in done], name, progress):
                section["cases"].append(each)
                section["seconds"] += seconds
                write_json(path, found)
            section["complete"] = True
        section["summary"] = SUMMARIES[name](section["cases"])
        write_json(path, found)
    return found


def bf16_instructions() -> bool | None:
    """Whether the processor multiplies bfloat16 itself; None where the system does not tell."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.is_file() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"}) if words else None


def _measured(cases: list[dict], name: str, progress: bool) -> Iterable[tuple[dict, float]]:
    """Each case with what came out, and the seconds it took; options are compared with one float32 step made first."""
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.pt"
        for case in bar(cases, desc=name, unit="case", enabled=progress):
            start = time.perf_counter()
            if name == "options" and not reference.exists():
                base = {**case, "form": "fast", "precision": "32-true", "save": str(reference)}
                alone.fresh({**base, "kind": "gradients", "settings": _without_options(case["settings"])})
            more = {"reference": str(reference)} if name == "options" else {}
            found = alone.fresh({**case, **more})
            if "failed" in found and name in ("forms", "parts"):  # elsewhere it is told in the table
                raise RunError(f"section {name}, {case['form']} form of {case['profile']}: {found['failed']}")
            yield {"case": case, "found": found}, time.perf_counter() - start


def _without_options(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if not key.startswith("training.")}


def _key(case: dict) -> str:
    return json.dumps(case, sort_keys=True)


def _same(one: dict, other: dict) -> bool:
    return all(one[key] == other[key] for key in ("commit", "processor", "threads", "accelerators"))


def _summary_of_forms(cases: list[dict]) -> dict[str, Any]:
    """{row: plain, fast, ratio, each median and range over processes, and the same of memory}."""
    seconds: dict[str, dict[str, list[float]]] = {}
    memory: dict[str, dict[str, list[float]]] = {}
    for each in cases:
        case, found = each["case"], each["found"]
        if case["kind"] == "steps":
            rows = [("step", found["seconds"]["median"], found["peak_mib"])]
        elif case["kind"] == "drawing":
            rows = [(f"{r['work']}, batch {r['batch']}", r["seconds"]["median"], r["peak_mib"]) for r in found["rows"]]
        else:
            continue
        for row, time_, peak in rows:
            seconds.setdefault(row, {form: [] for form in FORMS})[case["form"]].append(time_)
            memory.setdefault(row, {form: [] for form in FORMS})[case["form"]].append(peak)
    return {"seconds": {k: pairs(v) for k, v in seconds.items()}, "peak_mib": {k: pairs(v) for k, v in memory.items()}}


def pairs(values: dict[str, list[float]]) -> dict[str, Any]:
    """Of values in turn, {"plain": [..], "fast": [..]}: both spreads, and that of plain / fast over the pairs."""
    ratio = [one / other for one, other in zip(values["plain"], values["fast"], strict=True)]
    return {**{form: spread(values[form]) for form in FORMS}, "ratio": spread(ratio), "pairs": len(ratio)}


def _summary_of_parts(cases: list[dict]) -> dict[str, Any]:
    measured = [(each["case"], each["found"]) for each in cases if each["case"]["kind"] == "parts"]
    tables = {case["profile"]: {"threads": case["threads"], **found} for case, found in measured}
    return {"demo": _summary_of_forms(cases), "tables": tables}


def _summary_of_options(cases: list[dict]) -> dict[str, Any]:
    rows = {each["case"]["name"]: each["found"] for each in cases}
    default, summary = rows[REFERENCE], {}
    for name, found in rows.items():
        summary[name] = dict(found)
        if "failed" not in found:
            summary[name] |= {
                "times": found["seconds"]["median"] / default["seconds"]["median"],
                "memory_times": found["peak_mib"] / default["peak_mib"],
            }
    return summary


def _summary_of_growth(cases: list[dict]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for each in cases:
        rows = summary.setdefault(each["case"]["changes"], {"rows": []})["rows"]
        rows.append({"value": each["case"]["value"], **each["found"]})
    for varied in summary.values():
        good = [row for row in varied["rows"] if "failed" not in row]
        values, held = [row["value"] for row in good], statistics.median(row["held_mib"] for row in good)
        varied["time"] = exponent(values, [row["seconds"]["median"] for row in good])
        varied["memory"] = exponent(values, [row["peak_mib"] - row["held_mib"] for row in good])
        varied["held_mib"] = held
        varied["largest"] = {str(g): largest(varied["memory"], values[-1], held, 1024 * g) for g in GIB}
    return summary


def exponent(values: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """y = factor * x ** exponent by least squares in the logarithms; `error`: the exponent's standard error."""
    if len(values) < 3 or min(measured) <= 0:
        raise RunError(f"a fit needs three positive measurements, not {list(measured)}: measure the section again")
    fit = linregress([math.log(x) for x in values], [math.log(y) for y in measured])
    return {"exponent": float(fit.slope), "error": float(fit.stderr), "factor": math.exp(fit.intercept)}


def largest(fit: dict[str, float], start: float, held: float, limit: float) -> float | None:
    """Where doubling stops: the largest start * 2**k, k of either sign, whose held + fit is within `limit` (MiB).

    None where ten doublings do not reach it: so far, a fit says nothing.
    """

    def need(value: float) -> float:
        return held + fit["factor"] * value ** fit["exponent"]

    value = start
    while value >= 1 and need(value) > limit:
        value /= 2
    if value < 1:
        return 0
    while need(2 * value) <= limit:
        value *= 2
        if value >= start * 2**10:
            return None
    return value


def _summary_of_diffusion(cases: list[dict]) -> dict[str, Any]:
    """Rows for one image at each batch size: the generator's, then a diffusion model's of each size and walk."""
    rows: list[dict] = []
    ours: dict[int, dict] = {}
    for each in cases:
        found = each["found"]
        if "failed" in found:
            rows.append({"model": "failed", **each["case"], **found})
        elif each["case"]["kind"] == "drawing":
            [row] = found["rows"]
            count, joules = row["batch"], row["joules"]
            per = {"seconds": row["seconds"]["median"] / count, "joules": None if joules is None else joules / count}
            shape = {
                "model": OURS if each["case"]["form"] == "fast" else f"{OURS}, plain form",
                "batch": count,
                "side": found["side"],
            }
            shape |= {"how": "measured whole", "peak_mib": row["peak_mib"]}
            rows.append(shape | per | {"parameters": sum(found["parameters"].values())})
            ours[count] = rows[-1]  # the fast form comes last
        else:
            count, side = found["images"], found["side"]
            shape = {"batch": count, "side": side, "peak_mib": found["peak_mib"]}
            for steps, guided, name in diffusion.WALKS:
                both = {unit: diffusion.picture(found, steps, guided, unit) for unit in ("seconds", "joules")}
                how = "one step timed" if steps == 1 else f"one step timed, x {steps}"
                about = {"steps": steps, "guided": guided, "how": how}
                rows.append({"model": name, **shape, **both, **about, "parameters": sum(found["parameters"].values())})
    for row in rows:
        if "seconds" in row:
            row["seconds_a_megapixel"] = row["seconds"] / (row["side"] ** 2 / 1e6)
            row["times"] = row["seconds"] / ours[row["batch"]]["seconds"]
    whole = [each["found"] for each in cases if "whole" in each["found"]]
    checks = [
        {
            **{"steps": diffusion.WHOLE, "side": each["side"], "batch": each["images"]},
            "whole": each["whole"]["seconds"]["median"],
            "parts": diffusion.picture(each, diffusion.WHOLE, False) * each["images"],  # type: ignore[operator]
        }
        for each in whole
    ]
    return {"rows": rows, "checks": checks}


SUMMARIES: dict[str, Callable[[list[dict]], dict[str, Any]]] = {
    "forms": _summary_of_forms,
    "parts": _summary_of_parts,
    "options": _summary_of_options,
    "growth": _summary_of_growth,
    "diffusion": _summary_of_diffusion,
}


def stored(section: str, path: str | Path | None = None) -> dict[str, Any] | None:
    """A complete section of the committed measurement (`FILE`), or of `path`; None where there is none."""
    file = Path(path) if path else repository() / FILE
    found = read_json(file)["sections"].get(section) if file.is_file() else None
    return found if found and found["complete"] else None
