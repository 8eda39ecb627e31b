"""The command line: it does what the library does, and a mistake is one message and status 2."""

import shutil
from pathlib import Path

import pytest
import typer
import yaml
from PIL import Image

from ratlip.cli import app
from ratlip.errors import SettingsError
from ratlip.report import notebooks
from ratlip.settings import load_settings, profile_names, read_overrides

COMMANDS = [
    "profiles",
    "download",
    "prepare",
    "clip",
    "train",
    "evaluate",
    "generate",
    "export",
    "grid",
    "study",
    "verify",
    "report",
    "bench",
]
NOTEBOOK = ["run", "refresh", "smoke"]
RED = "a large red ring on the left on a white background"


def test_the_commands_are_these():
    assert sorted(command.callback.__name__ for command in app.registered_commands) == sorted(COMMANDS)
    assert [group.name for group in app.registered_groups] == ["notebook", "profile"]


@pytest.mark.parametrize("command", [*COMMANDS, "notebook", *(f"notebook {name}" for name in NOTEBOOK), "profile new"])
def test_each_command_explains_itself(ratlip, command):
    status, out, _ = ratlip(*command.split(), "--help")
    assert status == 0 and "Usage" in out and command in out


def test_every_option_explains_itself():
    for command in typer.main.get_command(app).commands.values():
        for each in [command, *getattr(command, "commands", {}).values()]:
            assert each.help and all(option.help for option in each.params if option.name != "help"), each.name


def test_profiles_are_listed_and_shown(ratlip):
    status, out, _ = ratlip("profiles")
    assert status == 0 and all(name in out for name in profile_names())
    status, out, _ = ratlip("profiles", "cub")
    assert status == 0
    assert yaml.safe_load(out) == yaml.safe_load(load_settings("cub").to_yaml())  # long lines are not broken


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["profiles", "smok"], "did you mean 'smoke'"),
        (["prepare", "-p", "nothing.yaml"], "no such profile file"),
        (["train", "-p", "smoke", "-s", "model.hiden_size=3"], "did you mean 'hidden_size'"),
        (["train", "-p", "smoke", "-s", "seed"], "should be KEY=VALUE"),
        (["train", "-p", "smoke", "-s", "=3"], "should be KEY=VALUE"),
        (["train", "-p", "smoke", "-s", "seed="], "has no value"),
        (["train", "-p", "smoke", "-s", "model.prompt_blocks=[1"], "is no YAML value"),
        (["prepare", "-p", "birds-small"], "needs the birds dataset"),
        (["prepare", "-p", "birds-small", "--data", "no such folder"], "no such folder"),
        (["clip", "-p", "birds-small"], "run `ratlip prepare"),
        (["evaluate", "-p", "smoke"], "not trained to its last step"),
        (["generate", RED, "--run", "no such run"], "has no config.yaml"),
        (["export", "no such run", "--to", "there"], "has no config.yaml"),
        (["download", "cats", "--to", "here"], "cats"),
        (["grid", "-p", "smok"], "did you mean 'smoke'"),
        (
            ["grid", "-p", "smoke", "--group", "abation"],
            "--group abation: should be one of ablation, sweep, versus, study",
        ),
        (["grid", "-p", "smoke", "--runner", "door"], "--runner door: should be papermill or library"),
        (["grid", "-p", "smoke", "--collect", "there"], "belong to a campaign"),
        (["grid", "birds.yaml"], "no such campaign file"),
        (["grid", "birds.yaml", "-s", "seed=1"], "names its groups and settings itself"),
        (["report", "-p", "smok"], "did you mean 'smoke'"),
        (["bench", "--show", "there.json"], "there is no such file"),
        (["bench", "-s", "seed"], "should be KEY=VALUE"),
        (["bench", "--report", "there.json", "--section", "form"], "--section form: should be one of forms, parts"),
        (["bench", "--report", "there.json", "-s", "seed=1"], "sections set what they compare"),
        (["notebook", "run", "there.ipynb", "--out", "out.ipynb"], "no such notebook"),
        (["notebook", "run", "there.ipynb", "--out", "out.ipynb", "-p", "profile"], "should be KEY=VALUE"),
    ],
)
def test_a_mistake_is_one_message_and_status_two(ratlip, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    status, out, err = ratlip(*arguments)
    assert status == 2
    assert said in err and err.startswith("ratlip: ") and "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    "arguments", [["train", "--nonsense"], ["generate"], ["generate", RED, "--run", "x", "-n", "0"], ["nonsense"]]
)
def test_a_wrong_option_is_status_two(ratlip, arguments):
    status, _, err = ratlip(*arguments)
    assert status == 2 and "Traceback" not in err


def test_the_grid_is_listed(ratlip, tmp_path):
    status, out, _ = ratlip("grid", "-p", "smoke", "--out", tmp_path, "--group", "versus")
    lines = out.splitlines()
    assert status == 0 and lines[-1] == f"0 of {len(lines) - 1} runs done"
    assert all(line.startswith("missing ") and "seed" in line for line in lines[:-1])


def test_a_notebook_gets_its_parameters(ratlip, monkeypatch):
    given = []
    monkeypatch.setattr(notebooks, "execute", lambda *arguments: given.append(arguments))
    options = ["-p", "profile=smoke", "-p", "data=", "-p", "report=None", "-p", 'settings={"model.attention": "none"}']
    status, _, _ = ratlip("notebook", "run", "a.ipynb", "--out", "b.ipynb", *options)
    parameters = {"profile": "smoke", "settings": {"model.attention": "none"}}
    assert status == 0 and given == [(Path("a.ipynb"), Path("b.ipynb"), parameters)]


def test_overrides_are_read_as_yaml():
    assert read_overrides(["seed=1", "model.prompt_blocks=[1, 2]", "clip.path=a=b.pt", "data.flip=false"]) == {
        "seed": 1,
        "model.prompt_blocks": [1, 2],
        "clip.path": "a=b.pt",
        "data.flip": False,
    }
    assert read_overrides(None) == {}
    with pytest.raises(SettingsError):
        read_overrides(["seed"])


def test_prepare_on_the_generated_set(ratlip, tmp_path):
    status, out, _ = ratlip("prepare", "-p", "smoke", "--out", tmp_path / ("long name " * 9), "-q")
    assert status == 0
    (line,) = out.splitlines()  # a long path stays in one piece
    assert line.endswith(": 192 training and 48 test images")
    folder = tmp_path / ("long name " * 9) / f"prepared-{load_settings('smoke').data_hash}"
    assert line.startswith(str(folder)) and (folder / "manifest.json").is_file()


def test_the_stations_one_after_another(ratlip, smoke, tmp_path):
    """From what is prepared to the scores; a second call finds everything there."""
    out = [
        "-p",
        "smoke",
        "--out",
        shutil.copytree(smoke.workspace.root, tmp_path / "out", ignore=shutil.ignore_patterns("runs")),
        "-q",
    ]
    status, said, _ = ratlip("clip", *out)
    assert status == 0 and "R@1" in said and "48 test images" in said
    for _ in range(2):
        status, said, _ = ratlip("train", *out, "--accelerator", "cpu", "-s", "training.steps=3")
        assert status == 0
    folder = tmp_path / "out" / "runs" / load_settings("smoke", {"training.steps": 3}).run_name
    assert said == f"{folder}\n" and (folder / "provenance.json").is_file()
    status, said, _ = ratlip("evaluate", *out, "-s", "training.steps=3")
    assert status == 0 and "colour right" in said and (folder / "scores.json").is_file()
    status, _, err = ratlip("train", *out, "-s", "seed=7", "--accelerator", "abacus")
    assert status == 2 and "accelerator=abacus" in err


def test_generate_writes_a_sheet(ratlip, smoke, tmp_path):
    status, out, err = ratlip(
        "generate", RED, "a red ring", "--run", smoke.run, "-n", "3", "-o", tmp_path / "g.png", "--device", "cpu"
    )
    assert status == 0 and out == f"{tmp_path / 'g.png'}\n"
    steps = smoke.settings.training.steps
    assert err == f"drawn by {smoke.run.name} (profile smoke, {steps} training steps)\n"
    width, height = Image.open(tmp_path / "g.png").size
    assert width > height > 200


def test_generate_writes_single_images_of_the_networks_size(ratlip, smoke, tmp_path):
    status, _, _ = ratlip("generate", RED, "a red ring", "--run", smoke.run, "-n", "3", "-o", tmp_path / "all")
    assert status == 0
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == [f"{caption:02d}-{i:03d}.png" for caption in range(2) for i in range(3)]
    assert {Image.open(path).size for path in (tmp_path / "all").iterdir()} == {(16, 16)}


def test_generate_notes_words_without_effect(ratlip, smoke, tmp_path):
    status, _, err = ratlip("generate", "a zebra", "--run", smoke.run, "-n", "1", "-o", tmp_path / "g.png")
    assert status == 0 and "note: " in err and "'zebra'" in err


@pytest.mark.parametrize(
    "options, said",
    [
        ([""], "no empty one"),
        ([RED, "-o", "grid.nonsense"], "--output grid.nonsense"),
        ([RED, "--device", "abacus"], "device=abacus"),
    ],
)
def test_generates_mistakes_are_messages_too(ratlip, smoke, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    status, _, err = ratlip("generate", *options, "--run", smoke.run)
    assert status == 2 and said in err and err.startswith("ratlip: ")
    assert not list(tmp_path.iterdir())


def test_what_the_disk_refuses_is_one_sentence_and_other_errors_are_not_hidden(ratlip, monkeypatch):
    def refuses(error):
        def app():
            raise error

        monkeypatch.setattr("ratlip.cli.app", app)

    refuses(OSError(28, "No space left on device", "/somewhere/x.json"))
    status, _, said = ratlip("train")
    assert status == 2 and said.startswith("ratlip: /somewhere/x.json: No space left on device; free disk space")
    refuses(FileNotFoundError(2, "No such file", "x"))
    with pytest.raises(FileNotFoundError):
        ratlip("train")
