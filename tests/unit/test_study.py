"""The study's raw results and answers: what is released, what is refused, and which way a difference points."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from ratlip.errors import RunError
from ratlip.files import read_json, write_json, write_text
from ratlip.report import study, verify
from ratlip.settings import load_settings
from ratlip.studies import grid, released
from ratlip.workspace import Workspace

SHARES = {
    "CAT + SA": 0.5,
    "RAT + SA": 0.3,
    "RAT scaled + SA": 0.7,
    "RAT scaled + norm": 0.6,
    "published RAT + SA": 0.35,
}
STEPS = (100, 200, 400, 800)


def share(label, seed, step):
    """Of a made-up run: it grows with the step, and is a little higher with each seed."""
    return round(SHARES[label] * STEPS.index(step) / 3 + 0.002 * seed + (0.001 if label == "CAT + SA" else 0) * seed, 4)


def made_up(run, root, commit="a" * 40, dirty=False):
    """The files of a finished run, without its weights."""
    folder = run.folder(root)
    about = dict(steps=800, training_seconds=300.0, commit=commit, uncommitted_changes=dirty, processor="none")
    write_json(folder / "provenance.json", about)
    write_text(folder / "config.yaml", run.settings.to_yaml())
    rows = [{"step": step, "judge_all": share(run.label, run.seed, step), "judge.size": 0.5} for step in STEPS[:-1]]
    write_text(folder / "visits.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(folder / "metrics.jsonl", "".join(json.dumps({"step": s, "g_total": 1 / s}) + "\n" for s in (25, 50)))
    end = {"judge_all": share(run.label, run.seed, 800), "judge": {"size": 0.75}, "images": 512, "seed": run.seed}
    write_json(folder / "scores.json", end | {"labels": {}, "real": {"judge_all": 0.98}, "seconds_per_image": 0.1})


@pytest.fixture
def workspace(tmp_path):
    workspace = Workspace.of(load_settings("study"), tmp_path / "outputs", progress=False)
    for run in grid.plan(workspace.settings, "study"):
        made_up(run, workspace.root)
    return workspace


def test_what_is_released_holds_every_number_and_gives_the_answers(workspace, tmp_path):
    folder = tmp_path / "report"
    released.release(workspace, folder)
    found = released.read(folder)
    assert found.complete and len(found.runs) == 40 and found.seeds == list(range(8))
    assert len(found.visits) == 40 * 4 and len(found.losses) == 40 * 2
    row = found.visits.query("label == 'RAT + SA' and seed == 3").set_index("step")
    assert row["judge_all"].to_dict() == {step: share("RAT + SA", 3, step) for step in STEPS}
    assert row["judge.size"].tolist() == [0.5] * 3 + [0.75] and "seconds_per_image" not in row
    run = next(run for run in grid.plan(workspace.settings, "study") if run.label == "CAT + SA")
    kept = (folder / "runs/settings" / f"{run.name}.yaml").read_text()
    assert kept == run.settings.to_yaml()
    said = study.answers(found).set_index(["question", "end_point"])
    first = said.loc[("RAT against CAT, equal scale", "end")]
    # 0.7 - 0.5 - 0.001 * seed: 20 points less 0.35 in the mean
    assert first["mean"] == pytest.approx(19.65) and first["seeds"] == 8 and first["p"] == 2**-7
    assert first["answer"] == "RAT scaled + SA better at the end here"
    assert said.loc[("the paper's form against the published code's", "end"), "mean"] == pytest.approx(-5)
    other = said.loc[("the paper's form against the published code's", "end"), "answer"]
    assert other.startswith("published RAT + SA better at the end here")
    area = np.trapezoid([0, 0.2 / 3, 0.4 / 3, 0.2], np.log10(STEPS)) / np.log10(8)
    of_area = said.loc[("RAT against CAT, equal scale", "area")]
    assert of_area["mean"] == pytest.approx(100 * area - 0.35, abs=0.01)


def test_the_page_is_made_from_what_was_released_alone(workspace, tmp_path):
    folder = tmp_path / "report"
    released.release(workspace, folder)
    shutil.rmtree(workspace.root)
    page = study.write(folder).read_text()
    assert "| RAT against CAT, equal scale | better at the end | +19.6 |" in page.replace("+19.7", "+19.6")
    assert "State: complete" in page and "| CAT + SA |" in page
    table = pd.read_csv(folder / "tables/variants.csv").set_index("variant")
    assert table.loc["RAT + SA", "judge_all"] == pytest.approx(0.307)
    assert {path.name for path in (folder / "figures").iterdir()} >= {"study_curves.png", "study_differences.svg"}


def test_no_answer_before_all_seeds_are_there(workspace, tmp_path):
    last = grid.plan(workspace.settings, "study")[-1]
    shutil.rmtree(last.folder(workspace.root))
    released.release(workspace, tmp_path)
    found = released.read(tmp_path)
    assert not found.complete and found.seeds == list(range(7))
    said = study.answers(found)
    assert set(said["answer"]) == {"not yet: 7 of 8 seeds are there"} and set(said["seeds"]) == {7}
    assert "**not complete**: 39 runs of 40" in study.write(tmp_path).read_text()


def test_what_nobody_could_make_again_is_refused(workspace, tmp_path):
    run = grid.plan(workspace.settings, "study")[5]
    made_up(run, workspace.root, dirty=True)
    with pytest.raises(RunError, match=f"{run.name}: trained with uncommitted changes"):
        released.release(workspace, tmp_path)
    made_up(run, workspace.root, commit="b" * 40)
    with pytest.raises(RunError, match="several commits"):
        released.release(workspace, tmp_path)
    assert not (tmp_path / "runs").exists()
    shutil.rmtree(workspace.root)
    with pytest.raises(RunError, match="none of the 40 runs is complete; `ratlip grid --profile study"):
        released.release(workspace, tmp_path)


def test_damaged_results_are_named(workspace, tmp_path):
    released.release(workspace, tmp_path)
    path = tmp_path / "runs/visits.csv"
    path.write_text(path.read_text().replace("label,seed", "name,seed", 1))
    with pytest.raises(RunError, match=r"visits\.csv: has no column label"):
        released.read(tmp_path)
    path.unlink()
    with pytest.raises(RunError, match="no released results"):
        released.read(tmp_path)
    assert read_json(tmp_path / "runs/plan.json")["visits"] == list(STEPS)


# `ratlip verify`: what was changed is found, and named.


@pytest.fixture
def sealed(workspace, tmp_path):
    folder = tmp_path / "report"
    released.release(workspace, folder)
    study.write(folder)
    write_text(folder / "plan.md", "# The plan\n")
    verify.seal(folder)
    return folder


def states(checks):
    return {each.level: each.state for each in checks}


def test_what_was_released_passes_and_runs_at_hand_are_equal(sealed, workspace):
    checks = verify.verify(sealed, workspace)
    assert states(checks) == {"intact": "PASS", "recomputable": "PASS", "rerun": "PASS"}
    assert len(checks[2].found) == 40 and "CAT + SA:0: of 8 scores 8 equal" in checks[2].found[0]
    elsewhere = Workspace.of(workspace.settings, sealed / "none", progress=False)
    last = verify.verify(sealed, elsewhere)[2]
    assert last.state == "INCONCLUSIVE" and "--rerun 'CAT + SA:0' trains one" in last.found[0]
    (sealed / "SHA256SUMS").unlink()
    assert verify.intact(sealed).state == "INCONCLUSIVE"


@pytest.mark.parametrize(
    "name",
    [
        "runs/visits.csv",
        "runs/runs.csv",
        "tables/answers.csv",
        "tables/variants.csv",
        "tables/measured.csv",
        "answers.md",
        "plan.md",
    ],
)
def test_one_changed_digit_is_found_and_named(sealed, workspace, name):
    path = sealed / name
    text = path.read_text()
    if name == "runs/visits.csv":
        assert ",800,0.7," in text
        path.write_text(text.replace(",800,0.7,", ",800,0.6,", 1))
    else:
        at = max(i for i, letter in enumerate(text) if letter.isdigit()) if name != "plan.md" else len(text) - 2
        path.write_text(text[:at] + ("7" if text[at] != "7" else "8") + text[at + 1 :])
    checks = verify.verify(sealed, workspace)
    assert checks[0].state == "FAIL" and checks[0].found == (f"{name} was changed",)
    follows = name in (
        "runs/visits.csv",
        "tables/answers.csv",
        "tables/variants.csv",
        "tables/measured.csv",
        "answers.md",
    )
    assert (checks[1].state == "FAIL") == follows
    if follows and not name.startswith("runs"):
        assert checks[1].found[0].startswith(f"{name} does not follow from runs/: -")


def test_missing_and_added_files_are_named(sealed, workspace):
    (sealed / "plan.md").unlink()
    write_text(sealed / "runs/more.csv", "x")
    assert verify.intact(sealed).found == ("plan.md is missing", "runs/more.csv was not released")


def test_a_run_that_comes_out_otherwise(sealed, workspace):
    run = next(run for run in grid.plan(workspace.settings, "study") if (run.label, run.seed) == ("RAT + SA", 4))
    path = run.folder(workspace.root) / "scores.json"
    scores = read_json(path)
    write_json(path, scores | {"judge_all": round(scores["judge_all"] + 0.001, 4)})
    check = verify.rerun(sealed, workspace, ["RAT + SA:4"])
    assert check.state == "PASS" and "1 inside" in check.found[0] and "7 equal" in check.found[0]
    write_json(path, scores | {"judge_all": 0.9})
    check = verify.rerun(sealed, workspace, ["RAT + SA:4"])
    assert check.state == "FAIL" and "RAT + SA:4, step 800, judge_all: 0.9, released 0.308" in check.found[1]
    with pytest.raises(RunError, match="holds no run RAT:9; there are CAT \\+ SA:0"):
        verify.rerun(sealed, workspace, ["RAT:9"])
    other = Workspace.of(load_settings("study", {"model.hidden_size": 16}), workspace.root, progress=False)
    last = verify.verify(sealed, other, ["RAT + SA:4"])[2]
    assert last.state == "FAIL" and "settings are not those of the release" in last.found[0]


def test_runs_with_one_setting_changed_stand_beside_those_of_the_same_seeds(sealed, workspace, tmp_path):
    for seed, lead in ((0, 0.1), (1, 0.2)):
        given = {"model.bridge_scale": 0, "training.visits": [100, 400], "seed": seed, "training.steps": 800}
        changed = grid.overridden(workspace.settings, {**grid.RAT, **grid.ATTENTION, **grid.SCALED, **given})
        run = grid.Experiment("RAT scaled + SA", "study", seed, changed)
        made_up(run, tmp_path)
        folder = sealed / "support/study" / run.name
        shutil.copytree(run.folder(tmp_path), folder)
        write_text(folder / "config.yaml", changed.to_yaml())
        write_json(folder / "checkpoint.json", {"label": run.label})
        scores = read_json(folder / "scores.json") | {"judge_all": share(run.label, seed, 800) - lead}
        write_json(folder / "scores.json", scores | {"diversity": {"ratio": {"entropy": 0.25, "spread": 0.5}}})
    found = released.read(sealed)
    table = study.support(found, released.collected(sealed, found))
    row = table.iloc[0]
    assert len(table) == 1 and row["changed"] == "bridge_scale 0.0" and row["seeds"] == 2
    assert (row["difference"], row["least"], row["largest"]) == pytest.approx((-15, -20, -10))
    assert "| bridge_scale 0.0 | RAT scaled + SA | 2 | 800 |" in study.write(sealed).read_text()


def test_what_layers_know_is_released_and_told(sealed):
    rows, words = [], []
    for label, lead in (("CAT + SA", 0.0), ("RAT + SA", 0.1)):
        for seed in (0, 1):
            for place, layers in (("condition", (1, 20)), ("map", (1, 5))):
                for layer in layers:
                    for attribute, extra in (("object", 0.0), ("colour", 0.2)):
                        own = {"place": place, "layer": layer, "attribute": attribute, "captions": 9, "chance": 0.3}
                        rows.append(
                            {**own, "accuracy": 0.5 + lead + extra + 0.1 * (layer > 1), "label": label, "seed": seed}
                        )
            words += [
                {"layer": n, "change": "object", "gamma": n / 10, "beta": 0.1, "label": label, "seed": seed}
                for n in (1, 2)
            ]
    for name, each in {"probes": rows, "words": words}.items():
        write_text(sealed / "runs" / f"{name}.csv", pd.DataFrame(each).to_csv(index=False))
    table = study.depth_table(released.read_probes(sealed)).set_index(["variant", "place"])
    assert table.loc[("RAT + SA", "map"), ["first", "last"]].tolist() == pytest.approx([70, 80])
    assert table.loc[("CAT + SA", "condition"), "first"] == pytest.approx(60) and (table["seeds"] == 2).all()
    page = study.write(sealed).read_text()
    assert "| RAT + SA | the map after a block | 70 ± 0 | 80 ± 0 | 2 |" in page.replace(
        "70.00 ± 0.00", "70 ± 0"
    ).replace("80.00 ± 0.00", "80 ± 0")
    assert (sealed / "figures/study_depth.png").is_file() and (sealed / "tables/depth.csv").is_file()


def test_what_was_released_before_stays_where_its_runs_are_gone(workspace, tmp_path):
    folder, runs = tmp_path / "report", grid.plan(workspace.settings, "study")
    for run in runs[20:]:
        shutil.rmtree(run.folder(workspace.root))
    released.release(workspace, folder)
    assert released.read(folder).seeds == [0, 1, 2, 3]
    for run in runs[:20]:
        shutil.rmtree(run.folder(workspace.root))
    for run in runs[18:]:  # two of them once more, and otherwise
        made_up(run, workspace.root)
    path = runs[19].folder(workspace.root) / "scores.json"
    write_json(path, read_json(path) | {"judge_all": 0.1234})
    released.release(workspace, folder)
    found = released.read(folder)
    assert found.complete and found.runs["run"].tolist() == [run.name for run in runs]
    assert len(found.visits) == 40 * 4 and len(found.losses) == 40 * 2
    last = found.visits[(found.visits["run"] == runs[19].name) & (found.visits["step"] == 800)]
    assert last["judge_all"].tolist() == [0.1234]
    assert set(read_json(folder / "runs/provenance.json")) == {run.name for run in runs}
    made_up(runs[39], workspace.root, commit="b" * 40)
    with pytest.raises(RunError, match="several commits"):
        released.release(workspace, folder)
