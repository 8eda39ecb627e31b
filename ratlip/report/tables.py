"""Tables of what is published and of what was measured here, side by side and never merged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ratlip.errors import RunError
from ratlip.files import read_json, write_json, write_text
from ratlip.published import NUMBERS
from ratlip.studies import compare, grid

if TYPE_CHECKING:
    from ratlip.workspace import Workspace

MINE, REAL = "measured here", "real images"
NONE = "-"  # a cell for which nobody has a number
DATASETS = {
    "synthetic": "generated set",
    "scenes": "generated scenes",
    "birds": "CUB",
    "flowers": "Oxford",
    "faces": "CelebA (ours)",
    "folder": "own pictures",
}
# The kinds of score that the authors publish too; all scores of a run (`scores.json`) in the order of the tables
COMPARED = ("independent_similarity", "clip_similarity", "frechet_distance")
SCORES = (*COMPARED, "kernel_distance", "inception_score", "precision", "recall", "judge_all")
COLUMNS = "whose group model data score label images extractor mean sd seeds steps".split()


@dataclass(frozen=True)
class Table:
    """A table: file `name`, `caption`, numbers as they are (`data`), text that is printed (`view`), `notes` below."""

    name: str
    caption: str
    data: pd.DataFrame
    view: pd.DataFrame
    notes: Sequence[str] = ()


def published_rows() -> pd.DataFrame:
    """One row a published number: whose, model, data, score, value, images, seeds, extractor, source."""
    n: dict[str, Any] = NUMBERS
    rows: list[dict] = []
    for score, models in n["values"].items():
        about = {"score": score, **n["scores"][score]}
        for model, values in models.items():
            whose = {"whose": n["whose"], "model": model}
            rows += [{**whose, "data": data, **about, "value": value} for data, value in values.items()]
    return pd.DataFrame(rows).assign(seeds=n["seeds"], source=n["source"])


def published_table(score: str) -> Table:
    """The paper's table of "FID" or "CLIP score" in its own shape: a row a model, a column a data set."""
    n: dict[str, Any] = NUMBERS
    rows, about = published_rows().query("score == @score").reset_index(drop=True), n["scores"][score]
    names = [name for name in ("CUB", "Oxford", "CelebA-tiny") if name in set(rows.data)]
    values = rows.pivot(index="model", columns="data", values="value").loc[rows.model.unique(), names]
    best = values == (values.min() if about["better"] == "lower" else values.max())
    view = values.map("{:.2f}".format).where(~best, values.map("{:.2f} (best)".format)).where(values.notna(), NONE)
    extractor = f"Extractor: {about['extractor']}. Images: {about['images']}; seeds: {n['seeds']}."
    notes = [f"{score}: {about['better']} is better. {extractor}", f"Source: {n['source']}.", *n["notes"][:-1]]
    caption = f"{score}, published by the authors; none of these numbers was measured here"
    name = f"published_{score.lower().replace(' ', '_')}"
    return Table(name, caption, rows, view.rename_axis(columns=None).reset_index(), notes)


def found_groups(workspace: Workspace) -> dict[str, pd.DataFrame]:
    """`grid.found` of every group that has a complete run. RunError, with the command, where none has."""
    every: tuple[str, ...] = workspace.settings.experiments.groups
    groups = {group: frame for group in every if len(frame := grid.found(workspace, group))}
    if not groups:
        raise _no_run(workspace, "")
    return groups


def _no_run(workspace: Workspace, group: str) -> RunError:
    of, option = (f" of the group {group}", f" --group {group}") if group else ("", "")
    command = f"ratlip grid --profile {workspace.settings.profile}{option} --run"
    return RunError(f"{workspace.root / 'runs'}: no complete run{of}; `{command}` makes them")


def measured_rows(workspace: Workspace, group: str) -> pd.DataFrame:
    """One row for each variant of a group and each score: mean, sd over seeds, seeds, images, steps, extractor.

    The last row of each score is that of real test images, which no model made. Empty where no run is complete.
    """
    frame, rows, s = grid.found(workspace, group), [], workspace.settings
    if frame.empty:
        return pd.DataFrame(columns=COLUMNS)
    first = read_json(workspace.root / "runs" / frame.run[0] / "scores.json")
    data, images = f"{DATASETS.get(s.data.dataset, s.data.dataset)}, {s.model.image_size} px", int(frame.images.min())
    steps = frame.groupby("label")["steps"].first()
    for column in [name for name in SCORES if name in frame]:
        label = first.get("labels", {}).get(column, column.replace("_", " "))
        about = (data, column, label, images, _extractor(first, column))
        for model, (mean, sd, seeds) in compare.mean_and_sd(frame, column).iterrows():
            rows.append((MINE, group, model, *about, mean, sd, int(seeds), steps[model]))
        if f"real.{column}" in frame:
            rows.append((MINE, group, REAL, *about, frame[f"real.{column}"].mean(), np.nan, 0, 0))
    return pd.DataFrame(rows, columns=COLUMNS)


def _extractor(scores: dict, column: str) -> str:
    """Which network looked at the images for a score, as the label of the score names it in brackets."""
    inside = re.search(r"\((.*)\)", scores.get("labels", {}).get(column, ""))
    return inside[1] if inside else "judge" if column == "judge_all" else str(scores["extractor"])


def _as_text(rows: pd.DataFrame) -> pd.DataFrame:
    """Measured rows with `score` and `value` as they are printed: a label without brackets, mean ± sd."""
    values = [compare.plus_minus(*pair) for pair in zip(rows["mean"], rows["sd"], strict=True)]
    return rows.assign(score=[label.split(" (")[0] for label in rows.label], value=values).astype({"images": str})


def measured_table(workspace: Workspace, group: str) -> Table:
    """Scores of every variant of a group as mean ± sd over seeds. RunError where none of its runs is there."""
    rows = measured_rows(workspace, group)
    if rows.empty:
        raise _no_run(workspace, group)
    numbers = {name: f"[{i}]" for i, name in enumerate(rows.extractor.unique(), 1)}
    text = _as_text(rows).assign(number=rows.extractor.map(numbers))
    for name in ("seeds", "steps"):
        text[name] = [f"{count:,}" if count else NONE for count in rows[name]]
    index = [*"model whose data images seeds steps".split(), text.score + " " + text.number]
    view = text.set_index(index).value.unstack(sort=False).fillna(NONE).reset_index().rename_axis(columns=None)
    notes = [
        f"Extractors: {'; '.join(f'{number} {name}' for name, number in numbers.items())}.",
        "Mean ± standard deviation over seeds. Scores of different extractors cannot be compared, nor these with "
        "published ones.",
    ]
    return Table(f"measured_{group}", f"Scores of the group {group}, measured here ({rows.data[0]})", rows, view, notes)


def side_by_side(
    workspace: Workspace, variants: Sequence[tuple[str, str]] = (("ablation", "CAT"), ("ablation", "RAT + SA"))
) -> Table:
    """Published rows and, below them, ours of some variants (group, label): two blocks, no joint ranking."""
    theirs, groups = published_rows(), dict.fromkeys(group for group, _ in variants)
    mine = pd.concat([measured_rows(workspace, group).astype(object) for group in groups], ignore_index=True)
    mine = mine[pd.MultiIndex.from_frame(mine[["group", "model"]]).isin(variants) & mine.score.isin(COMPARED)]
    floats = mine.astype(dict.fromkeys(("images", "seeds", "steps"), float))  # as the file always had them
    both = [theirs.rename(columns={"value": "mean"}).astype(object), floats.astype(object)]
    data = pd.concat(both, ignore_index=True)
    view = pd.concat([theirs.assign(value=[f"{v:.2f}" for v in theirs.value]), _as_text(mine)], ignore_index=True)
    view = view["whose model data score value extractor images seeds".split()].astype(str)
    notes = [
        "Two blocks: the upper is the authors', the lower ours. Data, image size, extractor, number of images and "
        "training differ, so no number of one block may be compared with one of the other.",
        *NUMBERS["notes"],
    ]
    return Table("published_and_measured", "Published numbers and ours, each with its owner", data, view, notes)


def study_table(rows: Sequence[dict], model: str) -> Table:
    """The rows of `ratlip.studies.protocol.study`, made from a run of `model`, as a table."""

    def number(value: float | None) -> str:
        return NONE if value is None else f"{value:.{compare.decimals(value, figures=3, most=3)}f}"

    view = []
    for row in rows:
        found = row.get("spread") is not None
        parts = f"{number(row['mean'])} ± {number(row['spread'])} ({row['parts']} parts)" if found else NONE
        named = (MINE, row["aspect"], row["variant"], row["label"], str(row["images"]))
        view.append((*named, number(row["value"]), number(row["real"]), parts))
    columns = ["whose", "changed", "variant", "score", "images", "distance", "real images", "mean ± sd of parts"]
    data = pd.DataFrame([{"whose": MINE, **row} for row in rows])
    notes = [
        "One generator, and one change at a time; the first row of each group is the protocol standard.",
        "Distances of different scores (extractors, ranges) have different units.",
    ]
    caption = f"One generator ({model}), measured here in {len(rows)} ways"
    return Table("protocol_study", caption, data, pd.DataFrame(view, columns=columns), notes)


def write(table: Table, folder: str | Path | None) -> Table:
    """Write <folder>/<name>.csv, .md, .tex, and .json for the page (nothing without a folder), and return the table."""
    if folder is not None:
        path = Path(folder) / table.name
        write_text(f"{path}.csv", table.data.to_csv(index=False, lineterminator="\n"))
        write_text(f"{path}.md", markdown(table))
        write_text(f"{path}.tex", latex(table))
        text = table.view.to_dict("split", index=False)  # columns, data
        write_json(f"{path}.json", {"caption": table.caption, "notes": list(table.notes), **text})
    return table


def markdown(table: Table) -> str:
    """The table as Markdown: caption, rows, notes."""
    lines = [list(table.view.columns), ["---"] * table.view.shape[1], *table.view.to_numpy().tolist()]
    cells = [[str(cell).replace("|", r"\|").replace("$", r"\$").replace("\n", " ") for cell in line] for line in lines]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    notes = "\n".join(f"- {note}" for note in table.notes)
    return f"**{table.caption}**\n\n{rows}\n\n{notes}".strip() + "\n"


_TEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}"}
    | {">": r"\textgreater{}", "±": r"$\pm$", "×": r"$\times$", "≥": r"$\geq$", "≤": r"$\leq$"}
)


def tex(text: str) -> str:
    """Text with everything escaped that LaTeX would read as a command."""
    return str(text).translate(_TEX)


def latex(table: Table) -> str:
    """The table as a LaTeX float in booktabs style, shrunk to the line where it has many columns."""
    cells = table.view.map(tex).rename(columns=tex)
    kinds = ["r" if cells[name].str.match(r"[-\d.,]").all() else "l" for name in cells]
    body = cells.to_latex(index=False, escape=False, column_format="".join(kinds))
    if len(kinds) > 6:
        body = f"\\resizebox{{\\linewidth}}{{!}}{{%\n{body.strip()}}}\n"
    notes = "".join(f"\\par\\footnotesize {tex(note)}\n" for note in table.notes)
    label = f"\\caption{{{tex(table.caption)}}}\n\\label{{tab:{table.name.replace('_', '-')}}}\n"
    start = "% needs \\usepackage{booktabs,graphicx}\n\\begin{table}[tb]\n\\centering\n"
    return f"{start}{label}{body}{notes}\\end{{table}}\n"
