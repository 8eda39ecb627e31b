"""The performance report: cases in processes of their own, ratios, fits, deviations, what is resumed; no times."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ratlip.errors import RunError, SettingsError
from ratlip.plots.growth import growth_figure
from ratlip.report import performance as tables
from ratlip.studies import alone, bench, cost, performance
from ratlip.studies.performance import Plan

PLAN = Plan("smoke", batch=4, counts=(1, 2), threads=1, accelerator="cpu", rounds=1, demo="smoke")


def answer(case: dict) -> dict:
    """What a process would answer on a machine where plain takes twice as long, and time grows as a power of 1.5."""
    number, plain = case.get("turn", 0), case["form"] == "plain"
    second = (2.0 + number if plain else 1.0) * case.get("value", 1) ** 1.5 * (3 if case["kind"] == "drawing" else 1)
    seconds = {"median": second, "low": second, "high": second}
    if case["kind"] == "parts":
        row = {"part": "all", "seconds": 2.0, "operations": 6e9, "reachable_share": 0.75}
        return {"rows": [row], "matrix_rate": 4e9, "step_operations": {"plain": 9e9, "fast": 6e9}}
    if case["kind"] == "drawing":
        rows = [
            {"work": kind, "batch": count, "seconds": seconds, "joules": 5.0 * count, "peak_mib": 200 if plain else 100}
            for count in case["counts"]
            for kind in case["kinds"]
        ]
        return {"rows": rows, "held_mib": 50, "parameters": {"generator": 10, "frozen CLIP": 20}, "side": 250}
    if case["kind"] == "denoising":
        parts = {name: {"seconds": {"median": 0.0}, "joules": None} for name in ("text, guided", "text, plain")}
        parts |= {"step, guided": {"seconds": {"median": 20.0 * case["batch"]}, "joules": None}}
        parts |= {"step, plain": {"seconds": {"median": 10.0 * case["batch"]}, "joules": None}}
        parts |= {"decoder": {"seconds": {"median": 5.0}, "joules": None}}
        found = {"images": case["batch"], "side": case["side"], "parameters": {"U-Net": 1}, "parts": parts}
        found |= {"whole": {"seconds": {"median": 46.0}, "joules": None}} if case["whole"] else {}
        return {**found, "peak_mib": 5000}
    apart = {"all": 1e-3, "worst": 2e-2, "tensor": "a.weight"}
    found = {"seconds": seconds, "first": 9.0, "held_mib": 100, "peak_mib": 100 + 50 * case.get("value", 1)}
    if "reference" in case:
        found["deviation"] = {"losses": 1e-4, "loss": "D real", "generator": apart, "discriminator": apart}
    return found


@pytest.fixture
def processes(monkeypatch):
    """The cases that were started, each answered by `answer`."""
    started = []

    def fresh(case):
        started.append(case)
        if "save" in case:
            Path(case["save"]).touch()
        return answer(case)

    monkeypatch.setattr(alone, "fresh", fresh)
    monkeypatch.setattr(performance.diffusion, "libraries", dict)
    return started


def test_plain_and_fast_run_in_turn_and_ratios_are_those_of_pairs(processes, tmp_path):
    found = performance.run(tmp_path / "p.json", PLAN, ["forms"], progress=False)
    assert [case["form"] for case in processes] == ["plain", "fast"] * 6
    assert [case["kind"] for case in processes] == ["steps", "steps", "drawing", "drawing"] * 3
    summary = found["sections"]["forms"]["summary"]
    step = summary["seconds"]["step"]
    assert step["ratio"] == {"median": 3, "low": 2, "high": 4} and step["pairs"] == 3
    assert step["fast"]["median"] == 1 and step["plain"] == {"median": 3, "low": 2, "high": 4}
    assert set(summary["seconds"]) == {"step"} | {
        f"{w}, batch {n}" for w in ("generation", "evaluation") for n in (1, 2)
    }
    assert summary["peak_mib"]["generation, batch 2"]["ratio"]["median"] == 2


def test_the_median_ratio_is_not_the_ratio_of_medians():
    found = performance.pairs({"plain": [2.0, 9.0, 4.0], "fast": [1.0, 3.0, 4.0]})
    assert found["ratio"] == {"median": 2, "low": 1, "high": 3}
    assert found["plain"]["median"] / found["fast"]["median"] == pytest.approx(4 / 3)


def test_a_section_goes_on_where_it_was_stopped(processes, tmp_path, monkeypatch):
    file, fresh = tmp_path / "p.json", alone.fresh

    def stops(case):
        if len(processes) == 5:
            raise KeyboardInterrupt
        return fresh(case)

    monkeypatch.setattr(alone, "fresh", stops)
    with pytest.raises(KeyboardInterrupt):
        performance.run(file, PLAN, ["forms"], progress=False)
    assert performance.stored("forms", file) is None
    monkeypatch.setattr(alone, "fresh", fresh)
    performance.run(file, PLAN, ["forms"], progress=False)
    assert len(processes) == 12 and performance.stored("forms", file)["complete"]
    performance.run(file, PLAN, ["forms"], progress=False)
    assert len(processes) == 12
    performance.run(file, PLAN, ["forms"], again=True, progress=False)
    assert len(processes) == 24


def test_half_a_section_of_another_machine_is_not_gone_on_with(processes, tmp_path):
    file = tmp_path / "p.json"
    found = performance.run(file, PLAN, ["growth"], progress=False)
    count = len(processes)
    found["sections"]["growth"]["complete"] = False
    found["sections"]["growth"]["environment"]["processor"] = "another"
    del found["sections"]["growth"]["cases"][3:]
    file.write_text(json.dumps(found))
    performance.run(file, PLAN, ["growth"], progress=False)
    assert len(processes) == 2 * count


def test_a_section_that_does_not_exist():
    with pytest.raises(SettingsError, match="--section form: should be one of forms, parts"):
        performance.run("p.json", PLAN, ["form"])


def test_options_are_compared_with_one_float32_step_that_is_made_first(processes, tmp_path):
    found = performance.run(tmp_path / "p.json", PLAN, ["options"], progress=False)
    first, *others = processes
    assert first["kind"] == "gradients" and first["form"] == "fast" and first["precision"] == "32-true"
    assert not [key for key in first["settings"] if key.startswith("training.")]
    assert [case["name"] for case in others] == list(performance.OPTIONS)
    assert {case["reference"] for case in others} == {first["save"]}
    for case in others:  # the same images, so that a step can be the same step
        assert {key: value for key, value in case["settings"].items() if key[:5] == "data."} == first["settings"]
        assert case["settings"].get("training.checkpointing", False) == ("checkpointing" in case["name"])
    assert found["sections"]["options"]["summary"]["float32, the plain form"]["times"] == 2


def test_powers_are_found_and_the_last_doubling_that_fits():
    x = [2, 4, 8, 16]
    fit = performance.exponent(x, [3 * n**1.5 for n in x])
    assert fit["exponent"] == pytest.approx(1.5) and fit["factor"] == pytest.approx(3)
    assert fit["error"] == pytest.approx(0, abs=1e-9)
    rough = performance.exponent(x, [1, 2.2, 3.7, 8.3])
    slopes, centred = torch.tensor([1, 2.2, 3.7, 8.3]).log(), torch.tensor(x).log() - torch.tensor(x).log().mean()
    slope = (centred * slopes).sum() / centred.square().sum()
    rest = slopes - slopes.mean() - slope * centred
    error = (rest.square().sum() / 2 / centred.square().sum()).sqrt()
    assert (rough["exponent"], rough["error"]) == pytest.approx((slope.item(), error.item()), rel=1e-4)
    linear = {"exponent": 1.0, "factor": 10.0}
    assert performance.largest(linear, 16, held=20, limit=20 + 640) == 64
    assert performance.largest(linear, 16, held=21, limit=20 + 640) == 32
    assert performance.largest(linear, 16, held=0, limit=45) == 4  # what was measured did not fit either
    assert performance.largest(linear, 16, held=100, limit=90) == 0
    assert performance.largest(linear, 16, held=0, limit=16 * 10 * 2**9) == 16 * 2**9
    assert performance.largest(linear, 16, held=0, limit=16 * 10 * 2**10) is None
    with pytest.raises(RunError, match="three positive"):
        performance.exponent([1, 2, 4], [1, 0, 2])


def test_growth_changes_one_thing_at_a_time(processes, tmp_path):
    summary = performance.run(tmp_path / "p.json", PLAN, ["growth"], progress=False)["sections"]["growth"]["summary"]
    assert list(summary) == ["batch", "image_size", "hidden_size"]
    assert [row["value"] for row in summary["batch"]["rows"]] == [2, 4, 8, 16]
    assert summary["batch"]["time"]["exponent"] == pytest.approx(1.5)
    assert summary["image_size"]["memory"]["exponent"] == pytest.approx(1)
    assert summary["batch"]["largest"] == {"24": 256, "80": 1024}  # 50 MiB an image
    for case in processes:
        assert case["batch"] == (case["value"] if case["changes"] == "batch" else 4)
        assert case["settings"].get("model.image_size", 16) == (
            case["value"] if case["changes"] == "image_size" else 16
        )
    figure = growth_figure(summary)
    assert len(figure.axes) == 6 and all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
    assert {(ax.get_xscale(), ax.get_yscale()) for ax in figure.axes} == {("log", "log")}
    assert "1.50 ± 0.00" in figure.axes[0].get_title()


def test_a_case_that_did_not_fit_is_left_out_of_the_fit_and_told(processes, tmp_path, monkeypatch):
    monkeypatch.setattr(alone, "fresh", lambda case: {"failed": "no room"} if case["batch"] == 16 else answer(case))
    file = tmp_path / "p.json"
    found = performance.run(file, PLAN, ["growth"], progress=False)
    assert found["sections"]["growth"]["summary"]["batch"]["time"]["exponent"] == pytest.approx(1.5)
    assert "no room" in tables.write(file, found).read_text()


def test_a_picture_by_diffusion_is_put_together_from_its_parts(processes, tmp_path):
    file = tmp_path / "p.json"
    summary = performance.run(file, PLAN, ["diffusion"], progress=False)["sections"]["diffusion"]["summary"]
    rows = {(r["model"], r["batch"], r["side"]): r for r in summary["rows"]}
    for batch in (1, 2):
        assert rows["50 steps, guidance", batch, 512]["seconds"] == 50 * 20 + 5
        assert rows["distilled, 4 steps", batch, 256]["seconds"] == 4 * 10 + 5
    ours = rows["RATLIP", 2, 250]
    assert ours["seconds"] == 1.5 and ours["joules"] == 5 and ours["seconds_a_megapixel"] == pytest.approx(24)
    assert rows["distilled, 1 step", 2, 512]["times"] == 10  # against the fast form at the same batch
    [check] = summary["checks"]
    assert (check["side"], check["batch"], check["whole"], check["parts"]) == (256, 1, 46, 45)


def test_the_verdict_on_diffusion_needs_a_measurement(processes, tmp_path):
    file = tmp_path / "p.json"
    verdict, _, told = cost.against_diffusion(file)
    assert verdict == "not measured" and "No diffusion model was measured" in told and "--section diffusion" in told
    found = performance.run(file, PLAN, ["diffusion"], progress=False)
    verdict, clause, told = cost.against_diffusion(file)
    # the cheapest: one step at 512 px, 15 s against 1.5 s: by the pixel 2.4 x at batch 2, 1.2 x at batch 1
    assert verdict == "undecided" and "at least 1 x" in clause and "50 steps, guidance, 512 px: 335 x" in told
    for row in found["sections"]["diffusion"]["summary"]["rows"]:
        if row["side"] == 512:
            row["seconds_a_megapixel"] *= 10
    file.write_text(json.dumps(found))
    assert cost.against_diffusion(file)[0] == "supported"


def test_tables_take_their_place_between_the_words_that_people_write(processes, tmp_path):
    file = tmp_path / "p.json"
    found = performance.run(file, PLAN, ["forms", "options"], progress=False)
    text = tables.write(file, found).read_text()
    assert "3.000 s (2.000 to 4.000) | 1.000 s (1.000 to 1.000) | 3.00 x (2.00 to 4.00)" in text
    assert found["sections"]["forms"]["environment"]["processor"] in text
    assert "not measured yet: `ratlip bench --report reports/performance.json --section growth`" in text
    (tmp_path / "p.md").write_text("Mine.\n" + text + "\nMine too.\n")
    found = performance.run(file, PLAN, ["growth", "diffusion", "parts"], progress=False)
    again = tables.write(file, found).read_text()
    assert again.startswith("Mine.\n") and again.endswith("\nMine too.\n") and "not measured yet" not in again
    assert tables.write(file, found).read_text() == again
    assert "1e-03 / 2e-02" in again and "not readable" in again and "reachable share" in again and "75%" in again
    assert (tmp_path / "p-growth.svg").is_file() and "(p-growth.svg)" in again


def test_a_case_is_measured_in_a_fresh_process(monkeypatch):
    calls = []

    def process(command, **_):
        calls.append(command)
        return SimpleNamespace(stdout='a remark\n{"peak_mib": 7}\n', returncode=0)

    monkeypatch.setattr(alone.subprocess, "run", process)
    assert alone.fresh({"kind": "steps"}) == {"peak_mib": 7}
    assert calls == [[sys.executable, "-m", "ratlip.studies.alone", '{"kind": "steps"}']]
    monkeypatch.setattr(alone.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="", returncode=-9))
    assert "too little memory" in alone.fresh({"kind": "steps"})["failed"]
    monkeypatch.setattr(alone.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="", returncode=1))
    with pytest.raises(RunError, match="stopped with status 1"):
        alone.fresh({"kind": "steps"})


@pytest.mark.parametrize("form", bench.FORMS)
def test_a_form_is_measured_alone(form):
    found = alone.measure(PLAN.case("steps", form=form, settings={}))
    assert found["peak_mib"] >= found["held_mib"] > 0 and found["seconds"]["median"] > 0
    found = alone.measure(PLAN.case("drawing", form=form, counts=[1, 2], kinds=["generation", "words", "evaluation"]))
    assert [(r["work"], r["batch"]) for r in found["rows"]][:4] == [
        ("generation", 1),
        ("words", 1),
        ("evaluation", 1),
        ("generation", 2),
    ]
    assert found["side"] == 16 and all(n > 0 for n in found["parameters"].values())


def tensors(scale=1.0, loss=0.5):
    grads = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([12.0 * scale]), "tiny": torch.tensor([1e-3 * scale])}
    return {"losses": {"D real": torch.tensor(loss), "G total": torch.tensor(10.0)}, "generator": grads,
            "discriminator": {"c": torch.tensor([1.0, -1.0])}}  # fmt: skip


def test_deviations_are_relative_to_the_whole_and_to_each_tensor():
    found = alone.deviation(tensors(scale=1.5, loss=0.7), tensors())
    assert found["losses"] == pytest.approx(0.2) and found["loss"] == "D real"  # below 1: the difference itself
    assert found["generator"]["all"] == pytest.approx(6 / 13)
    assert (found["generator"]["worst"], found["generator"]["tensor"]) == (pytest.approx(0.5), "b")  # tiny is too small
    assert found["discriminator"]["all"] == 0
    assert math.isnan(alone.deviation(tensors(loss=math.nan), tensors())["losses"])
    other = tensors()
    del other["generator"]["a"]
    with pytest.raises(RunError, match="generator: other tensors"):
        alone.deviation(other, tensors())


def test_the_same_step_has_no_deviation_whatever_was_trained_before_and_bf16_has_one(tmp_path):
    def found(name, form="fast", steps=0, **changed):
        case = PLAN.case("steps", form=form, settings=PLAN.still(), **changed)
        here = alone.build(case, tmp_path / name)
        for _ in range(steps):
            here.step()
        return alone.losses_and_gradients(here)

    reference = found("reference")
    assert all(grad.abs().sum() > 0 for grad in reference["discriminator"].values())  # not at the start, gates shut
    after = alone.deviation(found("trained", steps=2), reference)
    assert after["losses"] < 1e-5 and after["generator"]["worst"] < 1e-3 and after["discriminator"]["worst"] < 1e-3
    plain = alone.deviation(found("plain", "plain", steps=1), reference)
    assert plain["losses"] < 1e-4 and plain["generator"]["all"] < 1e-3 and plain["discriminator"]["all"] < 1e-3
    half = alone.deviation(found("half", precision="bf16-mixed"), reference)
    assert 1e-3 < half["generator"]["all"] < 0.5 and half["losses"] > after["losses"]


@pytest.mark.slow
def test_the_command_measures_writes_and_reads(tmp_path):
    command = [sys.executable, "-m", "ratlip.cli", "bench", "-p", "smoke", "--threads", "1", "--iterations", "1", "-q"]
    file = tmp_path / "p.json"
    done = subprocess.run(
        [*command, "--generation", "1", "--report", str(file), "--section", "growth"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "exponent of time" in (tmp_path / "p.md").read_text() and performance.stored("growth", file)
