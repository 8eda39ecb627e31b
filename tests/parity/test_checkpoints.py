"""Published checkpoints as files and dicts: round trip, prefixes, the CLIP tower inside, kinds of damage."""

import tempfile
from pathlib import Path

import pytest
import torch

from ratlip.errors import WeightsError
from ratlip.networks.official import CLIP_PREFIX, load_checkpoint, save_checkpoint


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def problems(source, clip):
    with pytest.raises(WeightsError) as caught:
        load_checkpoint(source, clip)
    return str(caught.value)


@pytest.fixture
def folder():
    """Not tmp_path, which keeps the last runs' folders: the files here are hundreds of MB."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@pytest.fixture
def tower(clip):
    """Entries of the CLIP tower as a published netG holds them."""
    return {CLIP_PREFIX + key: tensor.clone() for key, tensor in clip.visual.state_dict().items()}


def test_round_trip_through_a_file_is_exact(published, clip, tower, folder):
    model = {
        part: {key: torch.rand(shape) for key, shape in shapes.items()} for part, shapes in published.shapes.items()
    }
    model["netG"] |= {key: torch.tensor(5) for key in model["netG"] if key.endswith("num_batches_tracked")}
    model["netG"] |= tower
    checkpoint = {"model": model, "optimizers": {"optG": {"step": torch.tensor(3)}}, "epoch": 7}
    torch.save(checkpoint, folder / "published.pth")
    save_checkpoint(load_checkpoint(folder / "published.pth", clip), folder / "ours.pth")
    back = torch.load(folder / "ours.pth", weights_only=True)
    assert all(same(back["model"][part], model[part]) for part in ("netG", "netD", "netC"))
    assert back["epoch"] == 7 and torch.equal(back["optimizers"]["optG"]["step"], torch.tensor(3))
    assert sorted(path.name for path in folder.iterdir()) == ["ours.pth", "published.pth"]


def test_loaded_networks_share_no_memory_with_the_source(published, clip):
    model = published.blank_model()
    model["netG"]["fc_code.bias"] = torch.ones(3136)
    generator = load_checkpoint({"model": model}, clip).generator
    model["netG"]["fc_code.bias"].zero_()
    assert (generator.code.bias == 1).all() and generator.code.bias.requires_grad and not generator.training


def test_prefix_module_is_accepted_and_not_written(published, clip, folder):
    prefixed = {
        part: {f"module.{key}": tensor for key, tensor in state.items()}
        for part, state in published.blank_model().items()
    }
    networks = load_checkpoint({"model": prefixed}, clip)
    assert networks.kind.lower() == published.kind
    save_checkpoint(networks, folder / "ours.pth")
    written = torch.load(folder / "ours.pth", weights_only=True)["model"]
    assert published.shapes == {
        part: {key: list(tensor.shape) for key, tensor in state.items()} for part, state in written.items()
    }


def test_discriminator_may_be_absent(published, clip, folder):
    model = published.blank_model()
    networks = load_checkpoint({"model": {"netG": model["netG"]}}, clip)
    with pytest.raises(WeightsError, match="no netC and no netD"):
        _ = networks.discriminator
    save_checkpoint(networks, folder / "ours.pth")
    assert set(torch.load(folder / "ours.pth", weights_only=True)["model"]) == {"netG"}
    with pytest.raises(WeightsError, match="no netC"):
        _ = load_checkpoint({"model": {"netG": model["netG"], "netD": model["netD"]}}, clip).discriminator


def test_one_error_lists_every_problem_of_every_part(published, clip, tower):
    model = published.blank_model()
    model["netG"] |= tower
    del model["netG"]["fc_code.bias"], model["netC"]["joint_conv.2.weight"]
    model["netG"]["GBlocks.9.c1.weight"] = torch.zeros(1)
    model["netD"]["main.gamma"] = torch.zeros(2)
    model["netD"]["main.conv_s.bias"] = "text"
    model["netG"][f"{CLIP_PREFIX}class_embedding"][0] += 1
    model["netG"][f"{CLIP_PREFIX}ln_pre.bias"] = torch.zeros(3)
    model["netG"][f"{CLIP_PREFIX}other"] = torch.zeros(3)
    model["netX"] = {}
    message = problems({"model": model}, clip)
    for line in (
        "missing: netG fc_code.bias (3136,)",
        "missing: netC joint_conv.2.weight (1, 128, 4, 4)",
        "left over: netG GBlocks.9.c1.weight",
        "other shape: netD main.gamma is (2,), needs (1,)",
        "other shape: netD main.conv_s.bias is str",
        "left over: netX",
        f"other values: netG {CLIP_PREFIX}class_embedding",
        f"other shape: netG {CLIP_PREFIX}ln_pre.bias",
        f"left over: netG {CLIP_PREFIX}other",
    ):
        assert line in message
    assert message.startswith(f"the checkpoint is not a {published.kind.upper()} checkpoint")
    assert "9 entries" in message and len(message.splitlines()) == 10


def test_clip_entries_may_be_partial_half_precision_or_named_visual(published, clip, tower):
    model = published.blank_model()
    model["netG"][f"{CLIP_PREFIX}visual.conv1.weight"] = tower[f"{CLIP_PREFIX}conv1.weight"].half()
    model["netG"][f"module.{CLIP_PREFIX}ln_pre.bias"] = tower[f"{CLIP_PREFIX}ln_pre.bias"]
    networks = load_checkpoint({"model": model}, clip)
    assert set(networks.clip_names) == {f"{CLIP_PREFIX}visual.conv1.weight", f"{CLIP_PREFIX}ln_pre.bias"}
    assert networks.clip.model is clip and networks.clip.normalisation == "published"


def test_what_is_no_checkpoint_is_named_with_the_mend(clip, folder):
    assert "does not exist" in problems(folder / "absent.pth", clip)
    (folder / "damaged.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    assert "damaged.pth cannot be read" in problems(folder / "damaged.pth", clip)
    torch.save({"model": object()}, folder / "code.pth")  # a pickled object: refused by weights_only
    assert "code.pth cannot be read" in problems(folder / "code.pth", clip)
    torch.save([1, 2], folder / "list.pth")
    assert 'needs an entry "model"' in problems(folder / "list.pth", clip)
    assert "needs netG" in problems({"model": {"netD": {}}}, clip)


def test_another_clip_is_refused(published):
    import open_clip

    vision = dict(image_size=32, patch_size=8, width=64, layers=2, head_width=32)
    text = dict(context_length=8, vocab_size=32, width=32, heads=2, layers=1)
    small = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    assert "ViT-B/32" in problems({"model": published.blank_model()}, small)
