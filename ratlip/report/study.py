"""What the study says: its tables, figures and answers, made from the released raw results alone.

<report>/answers.md  tables/{answers,variants}.csv  figures/study_*.png, .svg
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ratlip.errors import RunError
from ratlip.files import write_text
from ratlip.plots import learning, style
from ratlip.report.performance import markdown
from ratlip.studies import released, statistics
from ratlip.studies.compare import differences, plus_minus
from ratlip.studies.released import Released

SCORE = "judge_all"
CONTRASTS = {  # the plan's: question -> the two variants, positive where the first is better
    "RAT against CAT, equal scale": ("RAT scaled + SA", "CAT + SA"),
    "shuffle attention against its norm alone": ("RAT scaled + SA", "RAT scaled + norm"),
    "the paper's form against the published code's": ("RAT + SA", "published RAT + SA"),
}
MEASURED = {"RAT as the paper writes it against CAT": ("RAT + SA", "CAT + SA")}  # beside the plan, without a verdict
BESIDE = {  # reported beside the end points, at the end of the training: column -> name
    "judge_all": "all named attributes right",
    "judge_new": "of captions true of no training image",
    "fresh.generated.frechet_distance": "FD to fresh renders (small CLIP)",
    "diversity.ratio.entropy": "entropy of what is not named / real",
    "diversity.ratio.spread": "spread inside a caption / real",
    "independent_similarity": "similarity, independent small CLIP",
}
POINTS = {"area": "faster (area)", "end": "better at the end"}  # end point -> its name in a table


def _last(visits: pd.DataFrame) -> pd.DataFrame:
    """The last visit of each run."""
    return visits.sort_values("step").groupby(["label", "seed"], sort=False).tail(1)


def end_points(found: Released) -> dict[str, pd.DataFrame]:
    """ "area": of the judged share over log steps; "end": the judged share of the last visit; a row a run each."""
    return {"area": statistics.areas(found.visits, SCORE), "end": _last(found.visits)[["label", "seed", SCORE]]}


def contrasts(found: Released) -> dict[tuple[str, str, str], statistics.Contrast | None]:
    """All tests of the plan together, on the seeds of which all variants are there."""
    kept = found.visits[found.visits["seed"].isin(found.seeds)]
    points = end_points(replace(found, visits=kept)) if len(kept) else {}
    keys = [(*pair, point) for pair in CONTRASTS.values() for point in statistics.END_POINTS]
    return statistics.contrasts({k: differences(points[k[2]], k[0], k[1], SCORE) if points else None for k in keys})


def answers(found: Released) -> pd.DataFrame:
    """One row a contrast and end point: the difference in percentage points, its intervals, p, and the answer.

    Before all seeds of the plan are there, no answer is given: looking early and stopping late is not what was planned.
    """
    names, rows = {pair: question for question, pair in CONTRASTS.items()}, []
    for (a, b, point), each in contrasts(found).items():
        row: dict[str, Any] = {"question": names[a, b], "a": a, "b": b, "end_point": point}
        if each is not None:
            scale = {name: round(100 * getattr(each, name), 2) for name in ("mean", "low", "high", "t_low", "t_high")}
            row |= {"seeds": each.n, **scale, "sd": round(100 * each.sd, 2), "p": each.p, "adjusted": each.adjusted}
            row |= {"equivalent": each.equivalent, "seen": round(100 * each.seen, 2)}
        wanted = len(found.plan["seeds"])
        early = f"not yet: {len(found.seeds)} of {wanted} seeds are there"
        rows.append(row | {"answer": statistics.word(each) if found.complete else early})
    return pd.DataFrame(rows)


def measured(found: Released) -> pd.DataFrame:
    """Differences that the plan does not test, with their interval alone: no verdict follows from them."""
    rows, points = [], end_points(found)
    for question, (a, b) in MEASURED.items():
        for point, frame in points.items():
            d = 100 * differences(frame, a, b, SCORE, drop=True)
            low, high = statistics.interval(d.to_numpy())
            rows.append(dict(question=question, end_point=point, seeds=len(d), mean=d.mean(), low=low, high=high))
    return pd.DataFrame(rows)


def variants(found: Released) -> pd.DataFrame:
    """One row a variant: mean and standard deviation over seeds of both end points and of what stands beside them."""
    points, last = end_points(found), _last(found.visits)
    columns = {"area": points["area"].rename(columns={SCORE: "area"}), **dict.fromkeys(_beside(found), last)}
    rows = {}
    for label in found.plan["labels"]:
        row: dict[str, Any] = {}
        for column, frame in columns.items():
            values = frame.loc[frame["label"] == label, column]
            row |= {column: values.mean(), f"{column}.sd": values.std(), "seeds": len(values)}
        rows[label] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("variant").reset_index()


def _beside(found: Released) -> list[str]:
    return [column for column in BESIDE if column in found.visits]


def _depth(probed: dict[str, pd.DataFrame]) -> Figure:
    """What each layer is told and knows: probes of conditions and maps (mean over attributes), and a changed word."""
    by = ["label", "seed", "place", "layer"]
    means = probed["probes"].groupby(by, sort=False)[["accuracy", "chance"]].mean().mul(100).reset_index()
    means = means.rename(columns={"accuracy": "value"})
    words = (
        probed["words"].groupby(["label", "seed", "layer"], sort=False)["gamma"].mean().rename("value").reset_index()
    )
    panels = {
        "what an affine reads": means[means["place"] == "condition"],
        "the map after a block": means[means["place"] == "map"],
        "a changed word": words,
    }
    read, chance = "attributes read (%)", float(means["chance"].mean())
    names = {"what an affine reads": ("affine", read), "the map after a block": ("block", read)}
    names["a changed word"] = ("affine", "change of gamma / its spread")
    titles = list(panels)
    return learning.by_depth(panels, names, dict.fromkeys(titles[:2], chance))


def depth_table(probed: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One row a variant and place: attributes read at the first and the last layer (%), mean and sd over seeds."""
    rows = []
    means = probed["probes"].groupby(["label", "seed", "place", "layer"], sort=False)["accuracy"].mean().reset_index()
    for (label, place), part in means.groupby(["label", "place"], sort=False):
        ends = {"first": part["layer"].min(), "last": part["layer"].max()}
        row = {"variant": label, "place": place, "seeds": part["seed"].nunique()}
        for name, layer in ends.items():
            values = 100 * part.loc[part["layer"] == layer, "accuracy"]
            row |= {name: values.mean(), f"{name}.sd": values.std()}
        rows.append(row)
    return pd.DataFrame(rows)


def _depth_page(table: pd.DataFrame) -> list[str]:
    if table.empty:
        return []
    names = {"condition": "what an affine reads", "map": "the map after a block"}
    rows = []
    for r in table.to_dict("records"):
        ends = [plus_minus(r[name], r[f"{name}.sd"]) for name in ("first", "last")]
        rows.append([r["variant"], names[r["place"]], *ends, str(r["seeds"])])
    return [
        "## What each layer knows (no answer follows)",
        "Share of the named attributes that a linear probe reads, mean over attributes, of captions that it was not "
        "fitted on: at the first and at the last layer of each kind.",
        "![what each layer knows](figures/study_depth.png)",
        markdown(["variant", "where", "first (%)", "last (%)", "seeds"], rows),
    ]


def support(found: Released, beside: pd.DataFrame) -> pd.DataFrame:
    """One row a changed setting and variant: share right at the last step, and what the change makes of the same seeds.

    `beside`: of `released.collected`. Differences in percentage points, over seeds: mean, least, largest. No test.
    """
    rows = []
    for (changed, label), part in beside.groupby(["changed", "label"], sort=False):
        last = part[part["step"] == part["step"].max()].set_index("seed")
        study = found.visits[found.visits["label"] == label]
        base = study[study["step"] == study["step"].max()].set_index("seed").loc[last.index]
        d = 100 * (last[SCORE] - base[SCORE])
        row = {"changed": changed, "variant": label, "seeds": len(last), "steps": int(last["step"].iloc[0])}
        row |= {"right": 100 * last[SCORE].mean(), "in_the_study": 100 * base[SCORE].mean()}
        row |= {"difference": d.mean(), "least": d.min(), "largest": d.max()}
        for name in ("entropy", "spread"):
            row[name] = last[f"diversity.ratio.{name}"].mean()
        rows.append(row)
    return pd.DataFrame(rows)


def _support_page(table: pd.DataFrame) -> list[str]:
    if table.empty:
        return []
    heads = ["changed", "variant", "seeds", "steps", "right (%)", "in the study (%)", "difference (points)"]
    rows = []
    for r in table.to_dict("records"):
        reach = f"{r['difference']:+.1f} ({r['least']:+.1f} to {r['largest']:+.1f})"
        cells = [r["changed"], r["variant"], str(r["seeds"]), f"{r['steps']:,}", f"{r['right']:.0f}"]
        rows.append([*cells, f"{r['in_the_study']:.0f}", reach, f"{r['entropy']:.2f}", f"{r['spread']:.2f}"])
    return [
        "## One setting changed (no answer follows)",
        "Runs of [support.yaml](support.yaml) against the study's runs of the same seeds. Entropy of what captions "
        "leave open and spread inside a caption are those of the changed runs, as shares of real images'.",
        markdown([*heads, "entropy", "spread"], rows),
    ]


def documents(folder: str | Path) -> dict[str, str]:
    """Every table and text that follows from what was released into `folder`: {file below it: content}."""
    found = released.read(folder)
    if found.visits.empty:
        raise RunError(f"{Path(folder) / 'runs'}: holds no run")
    said, beside, table = answers(found), measured(found), variants(found)
    more = released.collected(folder, found)
    changed = support(found, more) if len(more) else pd.DataFrame()
    probed = released.read_probes(folder)
    deep = depth_table(probed) if probed else pd.DataFrame()
    tables = {"answers": said, "measured": beside, "variants": table, "support": changed, "depth": deep}
    tables = {name: each for name, each in tables.items() if len(each)}
    made = {f"tables/{name}.csv": each.to_csv(index=False, float_format="%.6g") for name, each in tables.items()}
    return made | {"answers.md": _page(found, said, beside, table, [*_depth_page(deep), *_support_page(changed)])}


def write(folder: str | Path) -> Path:
    """Make all of it from what was released into `folder`; the path of answers.md. RunError where nothing was."""
    folder = Path(folder)
    for name, text in documents(folder).items():
        write_text(folder / name, text)
    found = released.read(folder)
    figures = {"study_curves": learning.learning_curves(found.visits, SCORE, "all named attributes right (%)")}
    d = {
        question: 100 * differences(end_points(found)["end"], *pair, SCORE, drop=True)
        for question, pair in CONTRASTS.items()
    }
    figures["study_differences"] = learning.seed_differences(d, "difference at the end (percentage points)")
    if probed := released.read_probes(folder):
        figures["study_depth"] = _depth(probed)
    for name, figure in figures.items():
        style.keep(figure, folder, name)
    return folder / "answers.md"


def _page(found: Released, said: pd.DataFrame, beside: pd.DataFrame, table: pd.DataFrame, after: list[str]) -> str:
    heads = ["question", "end point", "difference (points)", "95 % interval", "p (Holm)", "answer"]
    rows = [_answer_row(row) for row in said.to_dict("records")]
    names = {"area": "area under the curve (%)", **{column: BESIDE[column] for column in _beside(found)}}
    more = [_variant_row(row, list(names)) for row in table.to_dict("records")]
    other = [
        [
            r["question"],
            POINTS[r["end_point"]],
            f"{r['mean']:+.1f}",
            f"{r['low']:+.1f} to {r['high']:+.1f}",
            str(r["seeds"]),
        ]
        for r in beside.to_dict("records")
    ]
    state = "complete" if found.complete else f"**not complete**: {len(found.runs)} runs of {_planned(found)}"
    commit = ", ".join(sorted({str(each)[:7] for each in found.runs["commit"]}))
    hours = found.runs["training_seconds"].sum() / 3600
    return "\n\n".join(
        [
            "# Answers of the study",
            f"Made by `ratlip study` from `runs/`; the plan is [plan.md](plan.md). State: {state}; commit {commit}; "
            f"{hours:.1f} hours of training on one thread each.",
            "![judged share against steps](figures/study_curves.png)",
            markdown(heads, rows),
            "![differences by seed](figures/study_differences.png)",
            "Differences are a - b over seeds, in percentage points of test captions of which all that is named is "
            "right. The interval is that of this difference alone; p is adjusted for all tests of the plan.",
            "## Variants (mean ± standard deviation over seeds, at the end)",
            markdown(["variant", *names.values(), "seeds"], more),
            "## Measured beside the plan (no answer follows)",
            markdown(["question", "end point", "difference (points)", "95 % interval", "seeds"], other),
            *after,
            "",
        ]
    )


def _planned(found: Released) -> int:
    return len(found.plan["labels"]) * len(found.plan["seeds"])


def _answer_row(row: dict[str, Any]) -> list[str]:
    point = POINTS[row["end_point"]]
    if row.get("mean") is None or not np.isfinite(row["mean"]):
        return [row["question"], point, "-", "-", "-", row["answer"]]
    reach = f"{row['low']:+.1f} to {row['high']:+.1f}" if np.isfinite(row["low"]) else "too few seeds"
    return [row["question"], point, f"{row['mean']:+.1f}", reach, f"{row['adjusted']:.3f}", row["answer"]]


def _variant_row(row: dict[str, Any], columns: list[str]) -> list[str]:
    shares = ("area", "judge_all", "judge_new")
    cells = [
        plus_minus(*((100 if column in shares else 1) * row[f"{column}{end}"] for end in ("", ".sd")))
        for column in columns
    ]
    return [row["variant"], *cells, str(row["seeds"])]
