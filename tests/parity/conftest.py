"""The published networks with the fixtures' weights, in their plain and in their fast form."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ratlip.fast import accelerate
from ratlip.fast.tower import accelerate_tower

KINDS = ("ratlip", "galip")
FIXTURES = Path(__file__).parent / "fixtures"


class Published:
    """What the fixtures hold for one kind: key shapes, reference arrays, weights by the rule."""

    def __init__(self, kind: str):
        spec = importlib.util.spec_from_file_location("parity_rule", FIXTURES / "rule.py")
        self.rule = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.rule)
        self.kind = kind
        self.shapes = json.loads((FIXTURES / f"{kind}_keys.json").read_text())
        self.arrays = dict(np.load(FIXTURES / f"{kind}_parity.npz"))

    def model(self, salt: str = "parity") -> dict[str, dict[str, torch.Tensor]]:
        """A checkpoint's "model" with the rule's weights."""
        prefix = {"netG": "", "netD": "netD.", "netC": "netC."}
        return {
            part: {key: self._tensor(prefix[part] + key, shape, salt) for key, shape in shapes.items()}
            for part, shapes in self.shapes.items()
        }

    def blank_model(self) -> dict[str, dict[str, torch.Tensor]]:
        """A checkpoint's "model" of zeros that take no memory: for what depends on keys and shapes only."""
        return {
            part: {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
            for part, shapes in self.shapes.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])

    def real_images(self) -> torch.Tensor:
        return self.tensor("real_seed8").repeat_interleave(8, 2).repeat_interleave(8, 3)

    def _tensor(self, key, shape, salt):
        if key.endswith("num_batches_tracked"):
            return torch.tensor(0)
        return torch.from_numpy(self.rule.values(key, tuple(shape), salt))


@pytest.fixture(scope="session")
def clip():
    """The fixtures' CLIP; only its image tower is filled, the text tower is never used."""
    import open_clip

    model = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None)
    visual = {key: tensor for key, tensor in model.state_dict().items() if key.startswith("visual.")}
    Published(KINDS[0]).rule.fill_(visual)
    return model


@pytest.fixture(scope="module", params=["plain", "fast"])
def form(request):
    return request.param


@pytest.fixture(scope="module")
def in_form(form):
    """`in_form(networks)`: the published networks and their CLIP as plain or as fast modules."""

    def call(networks):
        accelerate(networks.generator, networks.discriminator, on=form == "fast")
        accelerate_tower(networks.clip.model.visual, on=form == "fast")
        return networks

    return call


@pytest.fixture(scope="module", params=KINDS)
def published(request):
    return Published(request.param)
