"""Stopped and resumed: exactly by default, as the published code does on request (difference 12)."""

import pytest
import torch
from lightning_fabric.plugins.precision.precision import Precision

from ratlip.errors import SettingsError
from ratlip.settings import load_settings
from ratlip.studies import paper_versus_code_protocol
from ratlip.training import loop, step

QUIET = {"training.sample_every": 1000}


@pytest.fixture
def sitting(smoke, tmp_path, monkeypatch):
    """`sitting(way, **options)` trains smoke, one folder for each way; -> what each step was given."""
    given = []
    training_step = step.training_step

    def watched(run, batch):
        latent = step.sample_latents(run.settings.seed, run.draw, 2, 4)
        given.append((run.step, batch["image"].tolist(), batch["caption"].tolist(), latent))
        return training_step(run, batch)

    monkeypatch.setattr(loop, "training_step", watched)

    def call(way, **options):
        given.clear()
        loop.train(
            load_settings("smoke", {**QUIET, "training.resume": way}),
            smoke.workspace.prepared,
            smoke.workspace.clip,
            smoke.workspace.sentences(),
            tmp_path / way,
            accelerator="cpu",
            progress=False,
            **options,
        )
        return list(given)

    return call


def test_the_published_way_begins_an_epoch_with_the_draws_of_a_fresh_start(sitting):
    first = [*sitting("published", end=0.0), *sitting("exact", end=0.0)]
    rest = sitting("published")
    assert [each[0] for each in first] == [0, 0] and [each[0] for each in rest] == list(range(1, 8))
    assert rest[0][1:3] == first[0][1:3] and torch.equal(rest[0][3], first[0][3])
    seen = [number for each in rest for number in each[1]]
    assert len(set(seen)) == len(seen) == 7 * 8  # one epoch, none of its images twice

    after = sitting("exact")
    assert not set(after[0][1]) & set(first[1][1]) and not torch.equal(after[0][3], first[1][3])
    assert [each[1] for each in rest[1:]] == [each[1] for each in after[:-1]]  # one step behind


def test_each_sitting_begins_anew(sitting):
    numbers = [sitting("published", end=0.0)[0][1] for _ in range(3)]
    assert numbers[0] == numbers[1] == numbers[2]
    exact = [sitting("exact", end=0.0)[0][1] for _ in range(3)]
    assert exact[0] != exact[1] != exact[2]


def test_the_loss_scale_comes_back_in_the_exact_way_alone(sitting, monkeypatch):
    restored = []
    monkeypatch.setattr(Precision, "load_state_dict", lambda self, state: restored.append(state))
    for way, times in (("published", 0), ("exact", 1)):
        restored.clear()
        sitting(way, end=0.0)
        sitting(way, end=0.0)
        assert len(restored) == times


def test_only_the_published_way_is_another_run():
    exact, published = (load_settings("smoke", {"training.resume": way}) for way in ("exact", "published"))
    assert exact.run_hash == load_settings("smoke").run_hash != published.run_hash
    with pytest.raises(SettingsError, match="training.resume='never'"):
        load_settings("smoke", {"training.resume": "never"})


@pytest.mark.slow
def test_an_exact_resume_is_the_same_run_and_a_published_one_is_not():
    changes = paper_versus_code_protocol.resumed_runs()
    assert changes["exact"] == 0 and changes["published"] > 0.3
