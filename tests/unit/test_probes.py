"""Linear probes: they read what is there and nothing else, of the captions and layers that they name."""

import numpy as np
import pytest
import torch
from torch import nn

from ratlip.data.generated import generated_set
from ratlip.networks import ConditionalAffine
from ratlip.settings import load_settings
from ratlip.studies import probes
from ratlip.training.generation import Run
from ratlip.workspace import Workspace


def test_a_probe_reads_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    noise = torch.from_numpy(rng.normal(size=(200, 12)))
    there = noise.clone()
    there[torch.arange(200), torch.from_numpy(labels)] += 6
    assert probes.accuracy(there, labels) > 0.97
    assert probes.accuracy(noise, labels) < 0.4
    assert probes.accuracy(1e-4 * there + 5, labels) > 0.97  # whatever its scale
    assert np.isnan(probes.accuracy(there[:12], np.arange(12) % 4))  # three of each: too few to leave some out


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    given = {"data.named": "subset", "training.steps": 2, "data.test_images": 120, "evaluation.images": 48}
    workspace = Workspace.of(load_settings("smoke", given), tmp_path_factory.mktemp("probes"), progress=False)
    workspace.train()
    return workspace


def test_conditions_and_maps_of_a_run_are_read_layer_by_layer(workspace):
    run = Run(workspace.run_folder, clip_folder=workspace.clip_folder)
    affines = [each for each in run.generator.modules() if isinstance(each, ConditionalAffine)]
    found, says = probes.layers(run, workspace.prepared, 120)
    assert sorted(layer for place, layer in found if place == "condition") == list(range(1, len(affines) + 1))
    assert {len(each) for each in found.values()} == {120} == {len(says)}
    hidden = run.settings.model.hidden_size
    assert found["condition", 1].shape == (120, hidden) and not torch.equal(
        found["condition", 1], found["condition", 2]
    )
    table = probes.readable(run, workspace.prepared, 120)
    assert set(table["place"]) == {"condition", "map"} and set(table["attribute"]) == {
        *generated_set(workspace.prepared).values
    }
    assert table.query("place == 'condition'")["layer"].max() == len(affines)
    named = (says != -1).sum(0)
    assert set(table[table["accuracy"].isna()]["attribute"]) <= {"colour"}  # eight values in some seventy captions
    first = table.query("place == 'map' and layer == 1").set_index("attribute")
    assert first["captions"].tolist() == named.tolist() and (named < 120).all()
    assert (table["chance"] < 0.8).all() and table["accuracy"].dropna().between(0, 1).all()


def test_a_changed_word_moves_the_affines_that_hear_it(workspace):
    run, made = Run(workspace.run_folder, clip_folder=workspace.clip_folder), generated_set(workspace.prepared)
    affines = [each for each in run.generator.modules() if isinstance(each, ConditionalAffine)]
    torch.manual_seed(0)
    for affine in affines:
        nn.init.normal_(affine.gamma[-1].weight, std=0.1)
        nn.init.zeros_(affine.beta[-1].weight)
    deaf = affines[3].gamma[0]
    nn.init.zeros_(deaf.weight)
    table = probes.word_effect(run, made, workspace.prepared.test.attributes[:40])
    assert len(table) == len(affines) * len(made.changes) and set(table["change"]) == set(made.changes)
    assert table["beta"].isna().all()  # beta is the same for all captions
    gamma = table.set_index("layer")["gamma"]
    assert gamma[4].isna().all() and (gamma.drop(4) > 0).all() and (gamma.drop(4) < 3).all()
