"""A run packed into one folder draws the same anywhere, says what it is, and is refused where it is not whole."""

import json
import os
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import ratlip as package
from ratlip.errors import RunError
from ratlip.report import card
from ratlip.settings import load_settings
from ratlip.training import choice, portable
from ratlip.training.session import read_checkpoint

RED = "a large red ring on the left on a white background"


@pytest.fixture(scope="module")
def exported(smoke, tmp_path_factory):
    return card.export(smoke.run, tmp_path_factory.mktemp("models") / "mine")


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_it_draws_to_the_bit_what_the_run_draws_and_needs_nothing_beside_it(smoke, copy):
    ours, packed = package.load(smoke.run, device="cpu"), package.load(copy, device="cpu")
    assert torch.equal(packed.generate([RED, "a ring"], n=3, seed=4), ours.generate([RED, "a ring"], n=3, seed=4))
    assert str(packed) == str(ours) and smoke.run.name in str(packed)
    assert packed.clip.unknown_words("a zebra") == ["zebra"]


def test_it_holds_the_averaged_generator_and_the_clip_and_nothing_of_the_training(smoke, exported):
    assert {path.name for path in exported.iterdir()} == {
        "model.safetensors",
        "config.json",
        "README.md",
        "samples.png",
    }
    state = load_file(exported / "model.safetensors")
    average = read_checkpoint(smoke.run / "checkpoint.pt", "cpu")["networks"]["average"]
    names = {f"generator.{name.removeprefix('module.')}" for name in average} - {"generator.n_averaged"}
    assert {name for name in state if not name.startswith("clip.")} == names
    assert torch.equal(state["generator.to_rgb.weight"], average["module.to_rgb.weight"])
    raw = read_checkpoint(smoke.run / "checkpoint.pt", "cpu")["networks"]["generator"]
    assert not torch.equal(state["generator.to_rgb.weight"], raw["to_rgb.weight"])
    assert (exported / "model.safetensors").stat().st_mode & 0o044 == 0o044 & ~os.umask(os.umask(0o022))


def test_the_settings_that_travel_are_the_runs(smoke, exported):
    settings = package.load(exported, device="cpu").settings
    assert settings.run_hash == smoke.settings.run_hash and settings.profile == "smoke"


def test_of_a_path_in_the_settings_the_name_alone_travels():
    own = {"clip.source": "file", "clip.path": "/home/me/weights.pt", "evaluation.extractor_weights": "/home/me/i.pt"}
    plain = portable._without_places(load_settings("cub", own))
    assert plain["clip"]["path"] == "weights.pt" and "/home" not in json.dumps(plain)


def test_the_card_is_made_from_the_runs_own_records(smoke, exported):
    text = (exported / "README.md").read_text()
    made = json.loads((smoke.run / "provenance.json").read_text())
    scores = smoke.scores
    judged = f"{100 * scores['judge_all']:.1f} % | {100 * scores['real']['judge_all']:.1f} % | - |"
    assert f"| all attributes right (judge) | {judged}" in text
    assert f"| colour right | {100 * scores['judge']['colour']:.1f} % |" in text and "| 12.5 % |" in text
    assert f"| {scores['frechet_distance']:.4g} | {scores['real']['frechet_distance']:.4g} |" in text
    assert "192 train, 48 test images" in text and "8 steps of batch 8, seed 0" in text
    assert made["commit"][:12] in text and "license: mit" in text and "Not scored" not in text
    assert str(smoke.run.parent) not in text + (exported / "config.json").read_text()


def test_a_run_without_scores_or_an_end_says_so(smoke, tmp_path):
    run = shutil.copytree(smoke.workspace.root, tmp_path / "out") / "runs" / smoke.run.name
    (run / "scores.json").unlink()
    (run / "provenance.json").unlink()
    text = (card.export(run, tmp_path / "to") / "README.md").read_text()
    assert "Not scored" in text and "Not trained to its last step" in text


@pytest.mark.parametrize(
    "dataset, said", [("birds", "Flickr"), ("faces", "non-commercial"), ("folder", "WRITE HERE"), ("scenes", "MIT")]
)
def test_the_licence_is_that_of_the_pictures(dataset, said):
    flip = {"data.flip": False} if dataset == "scenes" else {}
    assert said in card.licence(load_settings("birds-small", {"data.dataset": dataset, **flip}))


def test_without_prepared_data_captions_must_be_given(smoke, tmp_path):
    run = shutil.copytree(smoke.run, tmp_path / "out" / "runs" / smoke.run.name)
    where = {"clip_folder": smoke.workspace.clip_folder}
    with pytest.raises(RunError, match="--caption"):
        card.export(run, tmp_path / "to", **where)
    assert not (tmp_path / "to").exists()
    assert (card.export(run, tmp_path / "to", ["a ring"], **where) / "samples.png").stat().st_size > 1000


def test_only_an_exported_folder_is_replaced(smoke, exported, copy, tmp_path):
    (copy / "config.json").write_text("{}")
    assert package.load(card.export(smoke.run, copy), device="cpu").step == smoke.settings.training.steps
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="thesis.tex"):
        card.export(smoke.run, tmp_path / "full")
    with pytest.raises(RunError, match="exported model already"):
        card.export(exported, tmp_path / "again")


def damage_weights(folder):
    state = load_file(folder / "model.safetensors")
    state["generator.to_rgb.weight"][0] += 1
    save_file(state, folder / "model.safetensors")


def damage_clip(folder):
    state = load_file(folder / "model.safetensors")
    state["clip.token_embedding.weight"][0] += 1
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage, said",
    [
        (damage_weights, "its generator is not the one of config.json"),
        (damage_clip, "its CLIP is not the one of config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no whole exported model"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"1234567890"), "no whole exported model"),
        (lambda folder: (folder / "config.json").write_text("{"), "no whole exported model"),
        (lambda folder: change(folder, format=2), "has format 2"),
        (lambda folder: change(folder, settings={"profile": "x"}), "not those of this ratlip"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(copy, damage, said):
    damage(copy)
    with pytest.raises(RunError, match=said) as caught:
        package.load(copy, device="cpu")
    assert str(copy) in str(caught.value)


# --------------------------------------------------------------------------------------------------------- the hub


@pytest.mark.parametrize(
    "source, revision", [("hf://me/rings", None), ("hf:/me/rings", None), ("hf://me/rings@v2", "v2")]
)
def test_a_model_of_the_hub_is_fetched_and_opened(monkeypatch, exported, source, revision):
    asked = []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision, sorted(allow_patterns)))
        return str(exported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert package.load(source, device="cpu").generate("a ring").shape == (1, 1, 3, 16, 16)
    assert asked == [("me/rings", revision, ["config.json", "model.safetensors"])]


def test_without_a_network_the_hub_is_one_sentence(monkeypatch, ratlip):
    def snapshot_download(*arguments, **options):
        import logging

        logging.getLogger("huggingface_hub").error("many words")
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    status, out, err = ratlip("generate", RED, "--run", "hf://me/rings")
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("ratlip: hf://me/rings: could not be fetched (OSError); ") and "network" in err
    status, _, err = ratlip("generate", RED, "--run", "hf://rings")
    assert status == 2 and "should be hf://owner/name" in err


# ------------------------------------------------------------------------------- which model, where none is named


@pytest.fixture
def home(smoke, monkeypatch, tmp_path):
    """A checkout and its outputs, both empty: `.root`, `.add(profile, run, name)`."""
    (tmp_path / "ratlip").mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RATLIP_OUTPUTS", raising=False)
    age = iter(range(1000, 2000))

    def add(profile, name, steps=8):
        run = tmp_path / "outputs" / profile / "runs" / name
        run.mkdir(parents=True)
        (run / "checkpoint.pt").touch()
        (run / "provenance.json").write_text(json.dumps({"steps": steps}))
        os.utime(run / "provenance.json", (now := next(age), now))
        return run

    return SimpleNamespace(root=tmp_path, add=add)


def test_without_run_the_newest_complete_main_run_draws(home):
    main = load_settings("smoke").run_name
    first = home.add("smoke", main)
    home.add("smoke", "rat-h8-shuffle-seed1-00000000")  # newer, and not the main run
    assert choice.default_model() == first
    second = home.add("demo", load_settings("demo").run_name)
    assert choice.default_model() == second
    (second / "provenance.json").unlink()  # not complete
    assert choice.default_model() == first
    home.add("my", "cat-short", steps=9)
    own = home.add("my", "cat-long", steps=90)  # a profile of one's own: the longest
    home.add("my", "cat-shorter", steps=7)
    assert choice.default_model() == own


def test_else_the_best_model_that_came_along_and_it_says_which(ratlip, home, exported):
    models = home.root / "reports" / "study" / "models"
    for name, share in (("aa", 0.2), ("bb", 0.7), ("cc", 0.5)):
        change(shutil.copytree(exported, models / name), run=name, scores={"judge_all": share})
    (models / "zz").mkdir()  # no model
    status, out, err = ratlip("generate", RED, "-n", 1, "-o", "g.png", "--device", "cpu")
    assert status == 0 and out == "g.png\n" and err.startswith("drawn by bb (profile smoke")
    home.add("smoke", load_settings("smoke").run_name)
    assert choice.default_model().name == load_settings("smoke").run_name


def test_with_neither_it_says_what_to_do(ratlip, home):
    status, _, err = ratlip("generate", RED)
    assert status == 2 and "make reproduce" in err and "hf://owner/name" in err and err.count("\n") == 1


def test_a_caption_that_is_a_path_is_an_error(ratlip, home):
    (home.root / "runs").mkdir()
    for captions in (["runs"], [RED, str(home.root / "runs")]):
        status, _, err = ratlip("generate", *captions)
        assert status == 2 and "is a file or folder here, and no caption" in err and "--run" in err


def test_the_command_packs_a_run(ratlip, smoke, tmp_path):
    status, out, err = ratlip("export", smoke.run, "--to", tmp_path / "to", "--caption", "a ring")
    assert status == 0 and out.startswith(f"{tmp_path / 'to'}: ") and "--run" in out, err
    assert '"a ring"' in (tmp_path / "to" / "README.md").read_text()
