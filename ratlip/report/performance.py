"""`reports/performance.md`: its tables, made from `reports/performance.json`, between the words that people write.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; what is outside is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ratlip.files import write_text
from ratlip.plots import style
from ratlip.plots.growth import NAMES, growth_figure
from ratlip.studies.bench import FORMS
from ratlip.studies.performance import GIB

EMPTY = "(not measured yet: `ratlip bench --report reports/performance.json --section {}`)"


def write(path: str | Path, found: dict[str, Any]) -> Path:
    """Put the tables of `found` into the .md file beside the JSON file `path`, or into a new one."""
    file = Path(path).with_suffix(".md")
    text = file.read_text(encoding="utf-8") if file.is_file() else _blank()
    for name, table in TABLES.items():
        section = found["sections"].get(name)
        complete = section and section["complete"]
        words = "\n\n".join([*table(section), about(section)]) if complete else EMPTY.format(name)
        block = f"<!-- table: {name} -->\n{words}\n<!-- end of table -->"
        before, _, rest = text.partition(f"<!-- table: {name} -->")
        _, end, after = rest.partition("<!-- end of table -->")
        text = before + block + after if end else text  # a file without the marks does not show that table
        if complete and name == "growth":
            chart = file.with_name(f"{file.stem}-growth.svg")
            style.write(growth_figure(section["summary"]), chart)
            text = text.replace(block, block.replace("\n", f"\n![time and memory]({chart.name})\n\n", 1))
    write_text(file, text)
    return file


def _blank() -> str:
    tables = [f"## {name.capitalize()}\n\n<!-- table: {name} -->\n<!-- end of table -->\n" for name in TABLES]
    return "\n".join(["# Performance\n", *tables])


def about(section: dict[str, Any]) -> str:
    """The machine, the versions and the time of a section."""
    e, seconds = section["environment"], section["seconds"]
    bf16 = {True: " (with bf16 instructions)", False: " (without bf16 instructions)"}.get(
        e.get("bf16_instructions"), ""
    )
    where = f"{e['processor']}{bf16}, {e['cores']} cores, {e['threads']} thread{'s' * (e['threads'] != 1)}"
    where = ", ".join([*e["accelerators"], where])
    changed = ", with changes that are not committed" if e["uncommitted_changes"] else ""
    code = f"commit {(e['commit'] or 'unknown')[:7]}{changed}"
    return f"*{where}; PyTorch {e['versions']['torch']}, {code}, {e['time'][:10]}; measured in {seconds / 60:.0f} min.*"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def span(values: dict[str, float], form: str = "{:.2f}", unit: str = "") -> str:
    """Median and range as text."""
    median, low, high = (form.format(values[key]) for key in ("median", "low", "high"))
    return f"{median}{unit} ({low} to {high})"


def seconds(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f} s" if value >= 100 else f"{value:#.3g} s"


def forms(section: dict[str, Any]) -> list[str]:
    """Plain against fast: time and memory."""
    case = section["cases"][0]["case"]
    return [
        f"Profile `{case['profile']}`, float32, {case['batch']} images a step. Each cell: the median over "
        f"{_turns(section['summary'])} processes (range); a process's own value is the median of its rounds.",
        *_pairs(section["summary"]),
    ]


def _turns(summary: dict[str, Any]) -> int:
    return next(iter(summary["seconds"].values()))["pairs"]


def _pairs(summary: dict[str, Any]) -> list[str]:
    heads = ["", *FORMS, "plain / fast"]
    rows = [
        [name, *(span(each[form], "{:.3f}", " s") for form in FORMS), span(each["ratio"], "{:.2f}", " x")]
        for name, each in summary["seconds"].items()
    ]
    for name, each in summary["peak_mib"].items():
        inverse = {"median": 1 / each["ratio"]["median"], "low": 1 / each["ratio"]["high"]}
        share = span({**inverse, "high": 1 / each["ratio"]["low"]}, "{:.2f}", " x")
        cells = [span(each[form], "{:,.0f}", " MiB") for form in FORMS]
        rows.append([f"peak memory, {name}", *cells, f"fast / plain {share}"])
    return [markdown(heads, rows)]


def parts(section: dict[str, Any]) -> list[str]:
    """The demo's step, and where the time of a step goes."""
    case, out = section["cases"][0]["case"], []
    out.append(f"Profile `{case['profile']}`, {case['batch']} images a step, {case['threads']} thread.")
    out += _pairs(section["summary"]["demo"])
    for profile, found in section["summary"]["tables"].items():
        rate, total = found["matrix_rate"], sum(row["seconds"] for row in found["rows"])
        counts = ", ".join(f"{form} {found['step_operations'][form] / 1e9:.4g}" for form in FORMS)
        reached = found["step_operations"]["fast"] / total / rate
        out.append(
            f"A step of `{profile}`, threads: {found['threads']}; {counts} GFLOP. A large float32 product reaches "
            f"{rate / 1e9:.0f} GFLOP/s; all parts take {total:.3f} s, {reached:.0%} of that rate."
        )
        more = [key for key in found["rows"][0] if key not in ("part", "seconds", "operations")]
        rows = []
        for row in found["rows"]:
            pace = row["operations"] / row["seconds"]
            cells = [f"{row['seconds']:.3f}", f"{row['seconds'] / total:.1%}", f"{row['operations'] / 1e9:.2f}"]
            cells += [f"{pace / 1e9:.0f}", f"{pace / rate:.0%}"]
            rows.append([row["part"], *cells, *(_plain(row[key]) for key in more)])
        heads = ["part", "s", "share", "GFLOP", "GFLOP/s", "of the rate", *(key.replace("_", " ") for key in more)]
        out.append(markdown(heads, rows))
    return out


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def options(section: dict[str, Any]) -> list[str]:
    """Each option's price: time, memory, deviation."""
    rows = []
    for name, each in section["summary"].items():
        if "failed" in each:
            rows.append([name, each["failed"], *[""] * 6])
            continue
        apart = each["deviation"]
        cells = [span(each["seconds"], "{:.2f}", " s"), f"{each['times']:.2f} x", f"{each['peak_mib']:,} MiB"]
        cells += [f"{each['memory_times']:.2f} x", f"{_small(apart['losses'])} ({apart['loss']})"]
        for network in ("generator", "discriminator"):
            cells.append(f"{_small(apart[network]['all'])} / {_small(apart[network]['worst'])}")
        rows.append([name, *cells])
    heads = ["", "step", "of the default", "peak memory", "of the default", "losses", "G's gradient", "D's gradient"]
    heads[6:] = [f"{name}: all / worst tensor" for name in heads[6:]]
    case = section["cases"][0]["case"]
    return [
        f"Profile `{case['profile']}`, {case['batch']} images a step, a process each, median (range) of "
        f"{case['rounds']} steps after those that warm up. Deviations are from the default's own step, made in "
        "another process from the same weights, batch and latents.",
        markdown(heads, rows),
    ]


def _small(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def growth(section: dict[str, Any]) -> list[str]:
    """Exponents, and how far memory reaches."""
    rows, cases = [], []
    for varied, each in section["summary"].items():
        fits = [f"{each[key]['exponent']:.2f} ± {each[key]['error']:.2f}" for key in ("time", "memory")]
        values = [row["value"] for row in each["rows"]]
        ends = [_largest(each["largest"][str(size)], values[-1]) for size in GIB]
        rows.append([NAMES[varied], f"{values[0]} to {values[-1]}", *fits, *ends])
        for row in each["rows"]:
            told = [row["failed"], ""] if "failed" in row else [span(row["seconds"], "{:.2f}", " s"), ""]
            if "failed" not in row:
                told[1] = f"{row['peak_mib']:,} MiB ({row['held_mib']:,} before the step)"
            cases.append([NAMES[varied], str(row["value"]), *told])
    ends = [f"last doubling within {size} GiB" for size in GIB]
    return [
        markdown(["", "measured", "exponent of time", "exponent of memory", *ends], rows),
        markdown(["", "", "step", "peak memory"], cases),
    ]


def _largest(value: float | None, measured: float) -> str:
    if value is None:
        return "more than ten doublings away"
    return f"{value:,.0f}" + (" (extrapolated)" if value >= measured else "")


def diffusion(section: dict[str, Any]) -> list[str]:
    """A picture's price with diffusion and without."""
    summary, rows = section["summary"], []
    for row in summary["rows"]:
        name = row["model"] if row["model"].startswith("RATLIP") else f"SD 1.5: {row['model']}"
        if "failed" in row:
            rows.append([name, f"{row['side']} px", str(row["batch"]), row["failed"], *[""] * 6])
            continue
        joules = "not readable" if row["joules"] is None else f"{row['joules']:,.0f} J"
        cells = [seconds(row["seconds"]), f"{row['times']:,.1f} x", seconds(row["seconds_a_megapixel"]), joules]
        cells += [f"{row['peak_mib']:,} MiB", f"{row['parameters'] / 1e6:,.0f} M", row["how"]]
        rows.append([name, f"{row['side']} px", str(row["batch"]), *cells])
    heads = ["", "side", "batch", "an image", "of ours", "a megapixel", "energy an image", "peak memory", "parameters"]
    checks = [
        f"{check['steps']} steps without guidance, {check['side']} px, batch {check['batch']}: walked whole in "
        f"{seconds(check['whole'])}, put together from its parts {seconds(check['parts'])}."
        for check in summary["checks"]
    ]
    return [markdown([*heads, "how"], rows), *checks]


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "forms": forms,
    "parts": parts,
    "options": options,
    "growth": growth,
    "diffusion": diffusion,
}
