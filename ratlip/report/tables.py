"""Tables: what is published, and what was measured here. They stand beside each other and are never merged:
every row says whose it is, on which data, by which extractor, from how many images and seeds.

A `Table` holds the numbers as they are (`data`, for CSV) and as they are read (`view`, for Markdown and
LaTeX).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from ratlip.errors import RunError
from ratlip.files import read_json, write_text
from ratlip.studies import compare, grid

MINE, REAL = "measured here", "real images"
NONE = "-"  # a cell for which nobody has a number
# Scores of a run (`scores.json`) in the order of the tables; those of the kinds that the authors publish
SCORES = (
    "independent_similarity",
    "clip_similarity",
    "frechet_distance",
    "kernel_distance",
    "inception_score",
    "precision",
    "recall",
    "judge_all",
)
COMPARED = ("independent_similarity", "clip_similarity", "frechet_distance")


@dataclass(frozen=True)
class Table:
    """One table: file `name`, `caption`, numbers (`data`), what is printed (`view`, text only), `notes`
    below.
    """

    name: str
    caption: str
    data: pd.DataFrame
    view: pd.DataFrame
    notes: Sequence[str] = field(default=())


# ------------------------------------------------------------------------------------------------ published


def published() -> dict:
    """The content of `published.yaml`: the authors' numbers, their source, and notes on them."""
    return yaml.safe_load((resources.files("ratlip") / "published.yaml").read_text("utf-8"))


def published_rows() -> pd.DataFrame:
    """One row a published number: whose, model, data, score, value, images, seeds, extractor, source."""
    content = published()
    return pd.DataFrame(
        [
            {
                "whose": content["whose"],
                "model": model,
                "data": data,
                "score": score,
                **content["scores"][score],
                "value": value,
                "seeds": content["seeds"],
                "source": content["source"],
            }
            for score, models in content["values"].items()
            for model, values in models.items()
            for data, value in values.items()
        ]
    )


def published_table(score: str) -> Table:
    """The paper's table of "FID" or "CLIP score" in its own shape: a row a model, a column a data set."""
    rows, content = published_rows().query("score == @score"), published()
    about, better = (content["scores"][score], {"lower": min, "higher": max}[content["scores"][score]["better"]])
    view = rows.pivot(index="model", columns="data", values="value")
    view = view[[name for name in ("CUB", "Oxford", "CelebA-tiny") if name in view]].loc[rows.model.unique()]
    best = {name: better(view[name].dropna()) for name in view}
    shown = pd.DataFrame(
        {
            "model": view.index,
            **{
                name: [NONE if np.isnan(v) else f"{v:.2f}{' (best)' if v == best[name] else ''}" for v in view[name]]
                for name in view
            },
        }
    )
    notes = [
        f"{score}: {about['better']} is better. Extractor: {about['extractor']}. Images: {about['images']}; "
        f"seeds: {content['seeds']}.",
        f"Source: {content['source']}.",
        *content["notes"][:-1],
    ]
    return Table(
        f"published_{score.lower().replace(' ', '_')}",
        f"{score}, published by the authors; none of these numbers was measured here",
        rows.reset_index(drop=True),
        shown,
        notes,
    )


# ------------------------------------------------------------------------------------------------- measured


def found_groups(workspace) -> dict[str, pd.DataFrame]:
    """`experiments.found` of every group that has a complete run. RunError, with the command, where none has."""
    groups = {group: frame for group in grid.GROUPS if len(frame := grid.found(workspace, group))}
    if not groups:
        raise RunError(
            f"{workspace.root / 'runs'}: no complete run; `python -m ratlip.studies.grid --profile "
            f"{workspace.settings.profile} --run` makes them"
        )
    return groups


def measured_rows(workspace, group: str) -> pd.DataFrame:
    """One row for each variant of a group and each score: mean, sd over seeds, seeds, images, steps, extractor.

    The last rows are the scores of real test images, which no model made. Empty where no run is complete.
    """
    frame = grid.found(workspace, group)
    if frame.empty:
        return pd.DataFrame()
    first = read_json(workspace.root / "runs" / frame.run[0] / "scores.json")
    labels, data, rows = first.get("labels", {}), _data_name(workspace), []
    for column in [name for name in SCORES if name in frame]:
        about = {
            "data": data,
            "score": column,
            "label": labels.get(column, column.replace("_", " ")),
            "images": int(frame.images.min()),
            "extractor": _extractor(first, column),
        }
        for label, row in compare.mean_and_sd(frame, column).iterrows():
            steps = int(frame.steps[frame.label == label].iloc[0])
            rows.append(
                {
                    "whose": MINE,
                    "group": group,
                    "model": label,
                    **about,
                    "mean": row["mean"],
                    "sd": row["sd"],
                    "seeds": int(row["n"]),
                    "steps": steps,
                }
            )
        if f"real.{column}" in frame:
            rows.append(
                {
                    "whose": MINE,
                    "group": group,
                    "model": REAL,
                    **about,
                    "sd": np.nan,
                    "seeds": 0,
                    "mean": frame[f"real.{column}"].mean(),
                    "steps": 0,
                }
            )
    return pd.DataFrame(rows)


def _data_name(workspace) -> str:
    s = workspace.settings
    name = {"synthetic": "generated set", "birds": "CUB", "flowers": "Oxford", "faces": "CelebA (ours)"}
    return f"{name[s.data.dataset]}, {s.model.image_size} px"


def _extractor(scores: dict, column: str) -> str:
    """Which network looked at the images for a score, as the label of the score names it in brackets."""
    inside = re.search(r"\((.*)\)", scores.get("labels", {}).get(column, ""))
    return inside.group(1) if inside else "judge" if column == "judge_all" else str(scores["extractor"])


def measured_table(workspace, group: str) -> Table:
    """Scores of every variant of a group as mean ± sd over seeds. RunError where none of its runs is there."""
    rows = measured_rows(workspace, group)
    if rows.empty:
        raise RunError(
            f"{workspace.root / 'runs'}: no complete run of the group {group}; "
            f"`python -m ratlip.studies.grid --profile {workspace.settings.profile} --group {group} --run`"
        )
    extractors, view = list(dict.fromkeys(rows.extractor)), []
    heads = {
        row.score: f"{row.label.split(' (')[0]} [{extractors.index(row.extractor) + 1}]" for row in rows.itertuples()
    }
    for model, part in rows.groupby("model", sort=False):
        first = part.iloc[0]
        about = {
            "model": model,
            "whose": MINE,
            "data": first["data"],
            "images": str(first.images),
            "seeds": str(first.seeds or NONE),
            "steps": f"{first.steps:,}" if first.steps else NONE,
        }
        view.append(
            about | {heads[row.score]: compare.plus_minus(row["mean"], row["sd"]) for _, row in part.iterrows()}
        )
    notes = [
        f"Extractors: {'; '.join(f'[{i}] {name}' for i, name in enumerate(extractors, 1))}.",
        "Mean ± standard deviation over seeds. Scores of different extractors cannot be compared, nor these "
        "with published ones.",
    ]
    return Table(
        f"measured_{group}",
        f"Scores of the group {group}, measured here ({rows['data'][0]})",
        rows,
        pd.DataFrame(view).fillna(NONE),
        notes,
    )


def side_by_side(
    workspace, variants: Sequence[tuple[str, str]] = (("ablation", "CAT"), ("ablation", "RAT + SA"))
) -> Table:
    """Published rows and, below them, ours of some variants (group, label): two blocks, no joint ranking."""
    theirs, notes = published_rows(), published()["notes"]
    mine = [measured_rows(workspace, group) for group in dict.fromkeys(group for group, _ in variants)]
    mine = pd.concat([pd.DataFrame(columns=["group", "model", "score"]), *mine], ignore_index=True)
    wanted = [
        (group, label) in variants and score in COMPARED
        for group, label, score in zip(mine.group, mine.model, mine.score)
    ]
    mine = mine[wanted]
    view = [
        {
            "whose": row.whose,
            "model": row.model,
            "data": row.data,
            "score": row.score,
            "value": f"{row.value:.2f}",
            "extractor": row.extractor,
            "images": row.images,
            "seeds": row.seeds,
        }
        for row in theirs.itertuples()
    ]
    view += [
        {
            "whose": row["whose"],
            "model": row["model"],
            "data": row["data"],
            "score": row["label"].split(" (")[0],
            "value": compare.plus_minus(row["mean"], row["sd"]),
            "extractor": row["extractor"],
            "images": str(int(row["images"])),
            "seeds": str(int(row["seeds"])),
        }
        for _, row in mine.iterrows()
    ]
    data = pd.concat([theirs.rename(columns={"value": "mean"}).astype(object), mine.astype(object)], ignore_index=True)
    notes = [
        "Two blocks: the upper is the authors', the lower ours. Data, image size, extractor, number of "
        "images and training differ, so no number of one block may be compared with one of the other.",
        *notes,
    ]
    return Table(
        "published_and_measured", "Published numbers and ours, each with its owner", data, pd.DataFrame(view), notes
    )


def study_table(rows: Sequence[dict], model: str) -> Table:
    """The rows of `ratlip.studies.protocol.study`, made from a run of `model`, as a table."""

    def digits(value) -> str:
        return NONE if value is None else f"{value:.{compare.decimals(value, figures=3, most=3)}f}"

    data = pd.DataFrame(rows)
    data.insert(0, "whose", MINE)
    view = pd.DataFrame(
        [
            {
                "whose": MINE,
                "changed": row["aspect"],
                "variant": row["variant"],
                "score": row["label"],
                "images": str(row["images"]),
                "distance": digits(row["value"]),
                "real images": digits(row["real"]),
                "mean ± sd of parts": NONE
                if row.get("spread") is None
                else f"{digits(row['mean'])} ± {digits(row['spread'])} ({row['parts']} parts)",
            }
            for row in rows
        ]
    )
    notes = [
        "One generator, and one change at a time; the first row of each group is the protocol standard.",
        "Distances of different scores (extractors, ranges) have different units.",
    ]
    return Table("protocol_study", f"One generator ({model}), measured here in {len(rows)} ways", data, view, notes)


# -------------------------------------------------------------------------------------------------- writers


def write(table: Table, folder: str | Path | None) -> Table:
    """Write <folder>/<name>.csv, .md and .tex (nothing without a folder), and hand the table on."""
    if folder is not None:
        write_text(Path(folder) / f"{table.name}.csv", table.data.to_csv(index=False, lineterminator="\n"))
        write_text(Path(folder) / f"{table.name}.md", markdown(table))
        write_text(Path(folder) / f"{table.name}.tex", latex(table))
    return table


def markdown(table: Table) -> str:
    """The table as Markdown: caption, rows, notes."""

    def line(cells) -> str:
        return "| " + " | ".join(str(cell).replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"

    rows = [line(table.view.columns), line(["---"] * table.view.shape[1]), *map(line, table.view.to_numpy())]
    return "\n".join([f"**{table.caption}**", "", *rows, "", *[f"- {note}" for note in table.notes]]).strip() + "\n"


def read_markdown(text: str) -> Table:
    """A table written by `markdown`, as text (its `data` is its `view`). ValueError for anything else."""
    lines = text.strip().splitlines()
    rows = [
        [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if line.startswith("|")
    ]
    if not lines or not lines[0].startswith("**") or len(rows) < 2 or len({len(row) for row in rows}) > 1:
        raise ValueError("not a table of ratlip: it wants a bold caption and rows of equal length")
    view = pd.DataFrame(rows[2:], columns=rows[0])
    notes = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    return Table("", lines[0].strip("*"), view, view, notes)


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
}


def tex(text: str) -> str:
    """Text with everything escaped that LaTeX would read as a command."""
    return "".join(_LATEX.get(letter, letter) for letter in str(text))


def latex(table: Table) -> str:
    """The table as a LaTeX float in booktabs style, shrunk to the line where it has many columns."""
    escaped = table.view.map(tex).set_axis([tex(name) for name in table.view.columns], axis=1)
    numbers = [bool(escaped[name].str.match(r"[-\d.,]").all()) for name in escaped]
    body = escaped.to_latex(index=False, escape=False, column_format="".join("r" if n else "l" for n in numbers))
    if table.view.shape[1] > 6:
        body = "\\resizebox{\\linewidth}{!}{%\n" + body.strip() + "}\n"
    notes = "".join(f"\\par\\footnotesize {tex(note)}\n" for note in table.notes)
    return (
        "% needs \\usepackage{booktabs,graphicx}\n\\begin{table}[tb]\n\\centering\n\\caption{"
        f"{tex(table.caption)}}}\n\\label{{tab:{table.name.replace('_', '-')}}}\n"
        f"{body}{notes}\\end{{table}}\n"
    )
