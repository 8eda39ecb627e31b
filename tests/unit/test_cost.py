"""What generating costs (`ratlip.studies.cost`)."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

from ratlip.studies import cost
from ratlip.training import generation

MIB = 2**18  # float32 numbers in one MiB


class TestPeakMemory:
    def test_only_what_lives_at_one_time_counts(self):
        def one_after_the_other():
            for _ in range(5):
                torch.zeros(MIB)

        def together():
            return [torch.zeros(MIB) for _ in range(5)]

        assert cost.peak_memory(one_after_the_other) / 2**20 == pytest.approx(1, abs=0.01)
        assert cost.peak_memory(together) / 2**20 == pytest.approx(5, abs=0.01)

    def test_views_and_weights_are_not_counted(self):
        layer = nn.Linear(512, 512, bias=False)  # one MiB
        x = torch.zeros(512, 512)
        with torch.no_grad():
            assert cost.peak_memory(lambda: layer(x), layer) == 2**20
        y = torch.zeros(MIB)
        assert cost.peak_memory(lambda: y.view(512, 512).t()[:5]) <= 2**20

    def test_what_autograd_keeps_is_counted(self):
        layers = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(4)])
        x = torch.zeros(512, 512)
        with torch.no_grad():
            free = cost.peak_memory(lambda: layers(x), layers)
        assert cost.peak_memory(lambda: layers(x), layers) >= 4 * 2**20 > free


def test_generation_is_measured_for_each_batch_size(smoke):
    run = generation.Run(smoke.run)
    frame = cost.generation(run, ["a large red ring", "a small blue square"], (1, 3), seconds=0.05, device="cpu")
    assert frame["batch"].tolist() == [1, 3] and (frame["repeats"] >= 3).all()
    assert (frame["ms_low"] <= frame["ms"]).all() and (frame["ms"] <= frame["ms_high"]).all()
    assert (frame["images_per_second"] * frame["ms"]).tolist() == pytest.approx([1000, 3000])
    assert frame["memory_mib"].is_monotonic_increasing and frame["memory_mib"][0] > 0


def test_weights_are_all_of_them(smoke):
    run = generation.Run(smoke.run)
    found = cost.weights(run)
    assert sum(list(found.values())[1:]) == sum(p.numel() for p in run.clip.model.parameters())
    assert found["trained"] == sum(p.numel() for p in run.generator.parameters() if p.requires_grad) > 0


def test_the_table_of_costs(tmp_path):
    runs = pd.DataFrame([{"label": "CAT", "seed": 0, "run": name, "generator_parameters": 1_500_000} for name in "ab"])
    workspace = SimpleNamespace(root=tmp_path, settings=SimpleNamespace(model=SimpleNamespace(image_size=16)))
    generated = pd.DataFrame(
        [
            {
                "model": "CAT",
                "device": "cpu",
                "batch": batch,
                "ms": ms,
                "memory_mib": 1.0 * batch,
                "images_per_second": 1000 * batch / ms,
            }
            for batch, ms in ((1, 4.0), (8, 8.0), (16, 32.0))
        ]
    )
    table = cost.table(workspace, generated, runs, tmp_path / "none.json")
    row = table.view.iloc[0]
    assert (row["one image"], row["images a second"], row["at batch"], row["tensors"]) == (
        "4.0 ms",
        "1000",
        "8",
        "8.0 MiB",
    )
    assert "training step" not in row and row["parameters"] == "1.500 M" and row["whose"] == "measured here"
    assert table.notes[-1].startswith("No diffusion model was measured here; `ratlip bench --report")
