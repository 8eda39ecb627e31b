"""Training on the profile smoke: repeatable, resumable, and each network moved by its own loss alone."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ratlip.errors import RunError, SettingsError
from ratlip.settings import load_settings
from ratlip.training import loop, session, step
from ratlip.training.loop import train
from ratlip.training.session import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(smoke, tmp_path):
    """`run(name, overrides, **options)` trains smoke with overrides into a folder of that name."""

    def call(name="run", overrides=None, **options):
        settings = load_settings("smoke", {"training.sample_every": 1000, **(overrides or {})})
        return train(
            settings,
            smoke.workspace.prepared,
            smoke.workspace.clip,
            smoke.workspace.sentences(),
            tmp_path / name,
            **{"accelerator": "cpu", "progress": False, **options},
        )

    return call


def checkpoint(folder):
    return read_checkpoint(folder / "checkpoint.pt", "cpu")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(folder)]


def tensors(content, path="") -> dict:
    """All tensors and numbers of a nested checkpoint by their path."""
    if isinstance(content, dict):
        return {k: v for key, value in content.items() for k, v in tensors(value, f"{path}/{key}").items()}
    if isinstance(content, (list, tuple)):
        return {k: v for i, value in enumerate(content) for k, v in tensors(value, f"{path}/{i}").items()}
    return {path: content}


def assert_same_state(one, other):
    """Every tensor of two checkpoints is the same to the last bit."""
    a, b = (
        {key: value for key, value in tensors(content).items() if not key.startswith(("/seconds", "/settings"))}
        for content in (one, other)
    )
    assert a.keys() == b.keys()
    different = [key for key in a if not (torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key])]
    assert not different


def generator_weights(folder):
    return checkpoint(folder)["networks"]["generator"]


def contents(folder):
    """Digest and time of change of every file in the folder."""
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ------------------------------------------------------------------------------------ repeating and resuming


def test_a_run_leaves_what_its_docstring_says(smoke):
    names = {path.name for path in smoke.run.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "tensorboard", "samples", "checkpoint.pt", "provenance.json"}
    assert not [name for name in names if name.startswith(".")]
    assert [row["step"] for row in rows(smoke.run)] == [2, 4, 6, 8]
    assert {"d_real", "d_fake", "d_mismatch", "d_penalty", "d_total", "g_logit", "g_similarity", "g_total"} < set(
        rows(smoke.run)[0]
    )
    assert sorted(path.name for path in (smoke.run / "samples").iterdir()) == ["step-000004.png", "step-000008.png"]
    assert load_settings(smoke.run / "config.yaml") == smoke.settings
    assert smoke.run.name == smoke.settings.run_name
    facts = json.loads((smoke.run / "provenance.json").read_text())
    assert facts["steps"] == 8 and facts["clip_fingerprint"] == smoke.workspace.clip.fingerprint
    assert str(smoke.workspace.root) not in (smoke.run / "provenance.json").read_text()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(run):
    torch.manual_seed(123)
    one = run("one")
    torch.manual_seed(456)  # what happened before in the process must not matter
    again, other = run("again"), run("other", {"seed": 1})
    assert_same_state(checkpoint(one), checkpoint(again))
    assert losses(one) == losses(again)
    a, b = generator_weights(one), generator_weights(other)
    assert all(not torch.equal(a[key], b[key]) for key in ("code.weight", "to_rgb.weight"))


def test_how_often_it_logs_and_saves_does_not_change_the_weights(run):
    often = run("often", {"training.log_every": 1, "training.sample_every": 1, "training.checkpoint_every": 1})
    assert_same_state(checkpoint(often), checkpoint(run("seldom", {"training.log_every": 100})))


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(smoke, run, tmp_path):
    shutil.copytree(smoke.workspace.root, tmp_path / "out", ignore=shutil.ignore_patterns("runs"))
    overrides = {
        "training.steps": 60,
        "training.checkpoint_every": 5,
        "training.log_every": 1,
        "training.sample_every": 1000,
    }
    folder = tmp_path / "out" / "runs" / load_settings("smoke", overrides).run_name
    pairs = [part for key, value in overrides.items() for part in ("-s", f"{key}={value}")]
    job = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ratlip.cli",
            "train",
            "-p",
            "smoke",
            "--accelerator",
            "cpu",
            "-q",
            "--out",
            str(tmp_path / "out"),
            *pairs,
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 240
        while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= 8):  # past step 5's checkpoint
            assert job.poll() is None, job.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
        job.stderr.close()
    assert not loop.is_complete(folder)
    saved = checkpoint(folder)["step"]
    assert 5 <= saved < 60
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "secon')  # the kill may also come in the middle of a line

    whole = run("whole", overrides)
    assert run(folder, overrides) == folder
    assert loop.is_complete(folder)
    assert_same_state(checkpoint(folder), checkpoint(whole))
    assert [row["step"] for row in rows(folder)] == list(range(1, 61))
    assert losses(folder) == losses(whole)
    assert not list(folder.glob(".*"))


def test_a_complete_run_is_not_touched(run):
    folder = run()
    before = contents(folder)
    assert run() == folder
    assert run(accelerator="no such thing", devices=99) == folder
    assert run(overrides={"training.log_every": 1}) == folder  # the same weights, so the same run
    assert contents(folder) == before


def test_a_run_that_lacks_only_its_last_file_is_completed(run):
    folder = run()
    before = checkpoint(folder)
    (folder / "provenance.json").unlink()
    run()
    assert loop.is_complete(folder)
    assert_same_state(before, checkpoint(folder))
    assert [row["step"] for row in rows(folder)] == [2, 4, 6, 8]


@pytest.mark.parametrize("overrides", [{"seed": 1}, {"training.steps": 9}, {"model.attention": "none"}])
def test_a_folder_of_other_settings_is_refused_and_left_alone(run, overrides):
    folder = run()
    before = contents(folder)
    with pytest.raises(RunError, match="other settings.*run .* instead of .*; choose another folder"):
        run(overrides=overrides)
    assert contents(folder) == before


def test_a_folder_of_another_clip_is_refused(smoke, run, tmp_path):
    folder = run()
    identity = json.loads((folder / "identity.json").read_text())
    (folder / "identity.json").write_text(json.dumps({**identity, "clip": "0123456789ab"}))
    with pytest.raises(RunError, match=f"clip 0123456789ab instead of {smoke.workspace.clip.fingerprint}"):
        run()


@pytest.mark.parametrize("damage", ["cut", "emptied", "other", "pickled"])
def test_a_damaged_checkpoint_is_named_with_the_mend(run, damage):
    folder = run()
    (folder / "provenance.json").unlink()
    path = folder / "checkpoint.pt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "emptied":
        path.write_bytes(b"")
    else:
        torch.save({"step": 3} if damage == "other" else {"step": Path("code is not run")}, path)
    with pytest.raises(RunError) as caught:
        run()
    assert str(path) in str(caught.value) and "delete the file" in str(caught.value)
    path.unlink()
    run()
    assert loop.is_complete(folder)


@pytest.mark.parametrize("text", [None, "{", "[1, 2]"])
def test_a_damaged_identity_is_named(run, text):
    path = run() / "identity.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(RunError, match="identity.json: missing or damaged"):
        run()


# --------------------------------------------------------------------------------- who is moved by what


def test_the_clip_is_left_as_it_was(smoke, run):
    def digest():
        return hashlib.sha256(
            b"".join(t.detach().cpu().numpy().tobytes() for t in smoke.workspace.clip.model.state_dict().values())
        ).hexdigest()

    before = digest()
    run()
    assert digest() == before
    for name, parameter in smoke.workspace.clip.named_parameters():
        assert parameter.grad is None and not parameter.requires_grad, name


def test_each_loss_moves_its_own_network_only(run):
    """An optimiser step changes its own network; up to it, only its own gradients have changed."""
    groups, frozen, log = {}, {}, []

    def parameters(optimiser):
        return [p for group in optimiser.param_groups for p in group["params"]]

    def state():
        return {
            key: [(p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in parameters(o)]
            for key, o in groups.items()
        }

    def weights_differ(a, b):
        return any(not torch.equal(x[0], y[0]) for x, y in zip(a, b, strict=True))

    def gradients_differ(a, b):  # made or changed; those of the step before may have been freed
        return any(
            y[1] is not None and (x[1] is None or not torch.equal(x[1], y[1])) for x, y in zip(a, b, strict=True)
        )

    def before(optimiser, *_):
        for key, now in state().items():  # since the step before this one
            assert not weights_differ(frozen[key], now)
            assert gradients_differ(frozen[key], now) == (groups[key] is optimiser)
            log.append("between")
        groups[id(optimiser)] = optimiser
        frozen.update(state())

    def after(optimiser, *_):
        for key, now in state().items():
            assert weights_differ(frozen[key], now) == (groups[key] is optimiser)
            log.append("step")
        frozen.update(state())

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        run(overrides={"training.steps": 3})
    finally:
        for hook in hooks:
            hook.remove()
    assert len(groups) == 2 and log.count("between") >= 8 and log.count("step") >= 8


@pytest.mark.parametrize("attention", ["shuffle", "none", "norm"])
@pytest.mark.parametrize("conditioning", ["cat", "rat", "rat-official"])
def test_every_arm_trains_and_every_weight_of_it_learns(run, conditioning, attention):
    folder = run(
        overrides={
            "model.conditioning": conditioning,
            "model.attention": attention,
            "training.steps": 3,
            "model.rat_scope": "mapper" if conditioning == "rat-official" else "generator",
        }
    )
    assert all(math.isfinite(value) for row in rows(folder) for value in row.values())
    for name, optimiser in checkpoint(folder)["optimisers"].items():
        state = optimiser["state"]
        assert len(state) == len(optimiser["param_groups"][0]["params"])
        still = [number for number, moments in state.items() if not moments["exp_avg"].any()]
        assert not still, f"{name}: weights {still} never had a gradient"


def test_rat_in_the_mapper_alone_trains(run):
    folder = run(overrides={"model.rat_scope": "mapper", "training.steps": 2})
    assert any("recurrence" in key for key in generator_weights(folder))


@pytest.mark.parametrize(
    "overrides",
    [
        {"training.mismatch": "similar"},
        {"training.mismatch": "published"},
        {"training.real_resize": "nearest"},
        {"training.penalty_weight": 0},
        {"training.similarity_weight": 0},
        {"model.unused_shortcuts": True},
        {"model.prompt_blocks": []},
        {"training.batch_size": 7},
        {"training.batch_size": 2},
    ],
)
def test_every_other_choice_trains(run, overrides):
    folder = run(overrides={**overrides, "training.steps": 2})
    assert all(math.isfinite(value) for row in rows(folder) for value in row.values())


def test_the_published_batch_of_one_trains(run):
    run(overrides={"training.mismatch": "published", "training.batch_size": 1, "training.steps": 2})


def test_bfloat16_trains_close_to_float32(run):
    half = run("half", {"training.precision": "bf16-mixed", "training.steps": 2, "training.log_every": 1})
    full = run("full", {"training.steps": 2, "training.log_every": 1})
    assert checkpoint(half)["networks"]["generator"]["to_rgb.weight"].dtype == torch.float32
    a, b = losses(half)[0], losses(full)[0]
    assert a != b  # it was indeed another precision
    for key in a:
        assert a[key] == pytest.approx(b[key], abs=0.05), key


def test_loader_processes_change_nothing(run):
    assert_same_state(
        checkpoint(run("none", {"training.steps": 3})), checkpoint(run("two", {"training.steps": 3}, workers=2))
    )


# ------------------------------------------------------------------------------------------------ pieces


def test_the_average_follows_its_formula(smoke, run):
    """Runs of 1, 2 and 3 steps show the weights after each step; their average is recomputed from those."""
    decay = 0.15  # between the first two decays of the warm-up, so that both branches are met
    folders = [run(str(k), {"training.steps": k, "training.ema": decay}) for k in (1, 2, 3)]
    seen = [generator_weights(folder) for folder in folders]
    last = checkpoint(folders[-1])["networks"]
    for name, _ in session.build_networks(smoke.settings, smoke.workspace.clip)[0].named_parameters():
        expected = seen[0][name]
        for n, weights in enumerate(seen[1:], start=1):
            keep = min(decay, (1 + n) / (10 + n))
            expected = keep * expected + (1 - keep) * weights[name]
        torch.testing.assert_close(last["average"][f"module.{name}"], expected, rtol=1e-5, atol=1e-7)
    buffers = [key for key in seen[-1] if "running" in key]
    assert buffers
    for key in buffers:  # statistics are copied, not averaged
        assert torch.equal(last["average"][f"module.{key}"], seen[-1][key])


def test_no_average_where_none_is_wanted(run):
    assert set(checkpoint(run(overrides={"training.ema": 0}))["networks"]) == {"generator", "discriminator"}


def test_epochs_become_steps_rounded_up():
    assert loop.total_steps(load_settings("smoke", {"training.epochs": 3}), images=20) == 9  # batch 8
    assert loop.total_steps(load_settings("smoke", {"training.steps": 5}), images=20) == 5


def test_noise_is_a_function_of_seed_step_and_process():
    base = step.sample_latents(0, 5, 4096, 8)
    assert torch.equal(base, step.sample_latents(0, 5, 4096, 8))
    assert torch.equal(base[:3], step.sample_latents(0, 5, 3, 8))  # fewer images get the same latents
    for other in (
        step.sample_latents(1, 5, 4096, 8),
        step.sample_latents(0, 6, 4096, 8),
        step.sample_latents(0, 5, 4096, 8, rank=1),
    ):
        assert abs(torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]) < 0.03
    assert abs(base.mean()) < 0.03 and abs(base.std() - 1) < 0.03


def complete(groups):
    """The facts of captions that name all: each says its image's group (`clip.pairs.caption_facts`)."""
    return groups[:, None, None].expand(-1, 2, 1)


def test_roll_takes_the_neighbours_sentence():
    sentences, facts = torch.arange(10.0)[:, None].expand(10, 3), complete(torch.arange(10))
    for mode in ("roll", "published"):
        wrong = step.mismatch(torch.tensor([7, 2, 5, 0]), sentences, facts, mode, seed=0, step=0)
        assert wrong[:, 0].tolist() == [2, 5, 0, 7]
    alone = step.mismatch(torch.tensor([4]), sentences, facts, "published", seed=0, step=0)
    assert alone[:, 0].tolist() == [4]  # difference 7: the "mismatched" sentence is the true one
    with pytest.raises(ValueError, match="at least 2"):
        step.mismatch(torch.tensor([4]), sentences, facts, "roll", seed=0, step=0)


def test_similar_never_takes_a_true_caption_for_want_of_others():
    """All but one caption are true of the same image: mostly, the pool holds no 4 others to draw from."""
    groups = torch.zeros(400, dtype=torch.long)
    groups[0] = 1
    sentences = torch.eye(400)
    captions = torch.tensor([5, 0, 6, 0])
    for number in range(20):
        wrong = step.mismatch(captions, sentences, complete(groups), "similar", seed=0, step=number).argmax(dim=1)
        assert wrong[::2].tolist() == [0, 0]  # the neighbour's, or the only other one there is


def test_similar_takes_close_captions_of_other_images():
    """30 groups of 10 captions around a centre each: near ones of the own group are true, and never taken."""
    torch.manual_seed(0)
    groups = torch.arange(300) // 10
    sentences = (torch.randn(30, 4) + 1)[groups] + 0.01 * torch.randn(300, 4)
    captions = torch.arange(0, 160, 20)
    similar = step.mismatch(captions, sentences, complete(groups), "similar", 0, 0)
    drawn = torch.cdist(similar, sentences).argmin(dim=1)
    assert torch.equal(sentences[drawn], similar)
    assert (groups[drawn[::2]] != groups[captions[::2]]).all()
    assert torch.equal(drawn[1::2], captions.roll(-1)[1::2])
    cosine = torch.nn.functional.cosine_similarity(similar, sentences[captions])[::2]
    everything = torch.nn.functional.normalize(sentences) @ torch.nn.functional.normalize(sentences).T
    assert (cosine > everything[captions[::2]].median(dim=1).values).all()
    again, *others = (
        step.mismatch(captions, sentences, complete(groups), "similar", *key)
        for key in ((0, 0), (1, 0), (0, 1), (0, 0, 1))
    )
    assert torch.equal(similar, again)
    assert not any(torch.equal(similar, other) for other in others)  # by seed, step and process


def test_networks_that_do_not_fit_the_clip_are_refused(smoke):
    pretrained = {"clip.source": "pretrained", "model.attention": "none"}
    for wrong in ({"model.image_size": 32}, {"model.feature_blocks": [0, 3]}, {"model.prompt_blocks": [7]}):
        settings = load_settings("smoke", {**pretrained, **wrong})
        with pytest.raises(SettingsError, match=r"takes images of 16 px and has the blocks 0 to 2; set"):
            session.build_networks(settings, smoke.workspace.clip)


@pytest.mark.parametrize(
    "options",
    [
        {"accelerator": "abacus"},
        {"devices": 0},
        pytest.param(
            {"accelerator": "cuda"}, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
        ),
    ],
)
def test_a_device_that_is_not_here_is_an_error_of_the_user(run, options):
    with pytest.raises(RunError, match="not possible here"):
        run(**options)
