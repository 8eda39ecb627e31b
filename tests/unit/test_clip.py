"""FrozenClip: what it computes, what it does not compute, that it never changes; loading from every source."""

import warnings

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from ratlip.clip.frozen import FrozenClip, normalise
from ratlip.clip.loading import build_small_clip, load_clip
from ratlip.clip.vocabulary import PAD, START, UNKNOWN, Vocabulary
from ratlip.errors import WeightsError
from ratlip.settings import ClipSettings

TINY = dict(
    image_size=32,
    patch_size=8,
    width=32,
    layers=4,
    heads=2,
    text_width=16,
    text_layers=1,
    text_heads=2,
    embed_dim=12,
    context_length=8,
)


def tiny(normalisation="standard", seed=0):
    vocabulary = Vocabulary(["a", "red", "bird"], TINY["context_length"])
    torch.manual_seed(seed)
    return FrozenClip(build_small_clip(**TINY, vocab_size=len(vocabulary)), vocabulary, "tiny", normalisation)


@pytest.fixture
def clip():
    return tiny()


@pytest.fixture
def calls(clip):
    """How often each block of the image tower was computed."""
    counts = [0] * clip.layers
    for i, block in enumerate(clip.model.visual.transformer.resblocks):
        block.register_forward_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
    return counts


def images(n=2, size=32, seed=1):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ----------------------------------------------------------------------------------------- the frozen towers


def test_knows_its_sizes(clip):
    assert (clip.image_size, clip.grid, clip.width, clip.layers, clip.embed_dim) == (32, 4, 32, 4, 12)


def test_never_trains(clip):
    torch.nn.Sequential(clip).train()
    assert not any(module.training for module in clip.modules())
    assert not any(p.requires_grad for p in clip.parameters())


def test_features_are_the_blocks_outputs_in_the_order_asked_for(clip):
    outputs = {}
    for i, block in enumerate(clip.model.visual.transformer.resblocks):
        block.register_forward_hook(lambda _, __, out, i=i: outputs.__setitem__(i, out))
    features, embedding = clip.features(images(), [3, 0, 1])
    assert features.shape == (2, 3, 32, 4, 4) and embedding.shape == (2, 12)
    for k, block in enumerate([3, 0, 1]):
        assert torch.equal(features[:, k], outputs[block][:, 1:].transpose(1, 2).reshape(2, 32, 4, 4))
    assert torch.equal(embedding, clip.embed_images(images()))
    assert torch.equal(embedding, clip.model.encode_image(clip.preprocess(images())))


@pytest.mark.parametrize(
    "blocks, embedding, expected",
    [
        ([0, 2], False, [1, 1, 1, 0]),
        ([0], False, [1, 0, 0, 0]),
        ([3], False, [1, 1, 1, 1]),
        ([0, 2], True, [1, 1, 1, 1]),
    ],
)
def test_computes_no_block_that_nobody_reads(clip, calls, blocks, embedding, expected):
    full, _ = clip.features(images(), blocks)
    calls[:] = [0] * clip.layers
    features, answer = clip.features(images(), blocks, embedding=embedding)
    assert calls == expected
    assert torch.equal(features, full)
    assert (answer is None) == (not embedding)


@pytest.mark.parametrize("blocks", [[], [4], [-1, 2]])
def test_blocks_that_do_not_exist_are_refused(clip, blocks):
    with pytest.raises(ValueError, match="0..3"):
        clip.features(images(), blocks)


def test_gradients_reach_the_images(clip):
    x = images().requires_grad_()
    features, embedding = clip.features(x, [1])
    for output in (features, embedding):
        (gradient,) = torch.autograd.grad(output.square().sum(), x, retain_graph=True)
        assert (gradient.abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("mode, expected", [("standard", (0.0, 0.5, 1.0)), ("published", (0.5, 0.75, 1.0))])
def test_normalisation_maps_black_grey_white(mode, expected):
    clip = tiny(mode)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    for pixel, value in zip((-1.0, 0.0, 1.0), expected, strict=True):
        seen = clip.preprocess(torch.full((1, 3, 32, 32), pixel))[0, :, 0, 0]
        assert seen.tolist() == pytest.approx([(value - m) / s for m, s in zip(mean, std, strict=True)], abs=1e-6)
    assert torch.equal(normalise(images(), clip.mean, clip.std, mode), clip.preprocess(images()))


def test_wrong_image_size_is_refused(clip):
    for call in (clip.embed_images, lambda x: clip.features(x, [0])):
        with pytest.raises(ValueError, match="resize them first"):
            call(images(size=64))


def test_text_embeddings_do_not_depend_on_the_batch(clip):
    texts = ["a red bird", "bird", "red", "a bird", "a"]
    together, apart = clip.embed_text(texts), clip.embed_text(texts, batch_size=2)
    assert together.shape == (5, 12) and together.dtype == torch.float32 and not together.requires_grad
    torch.testing.assert_close(together, apart)
    assert clip.embed_text([]).shape == (0, 12)


def test_fingerprint_is_that_of_the_weights(clip):
    assert tiny().fingerprint == clip.fingerprint and len(clip.fingerprint) == 12
    assert tiny(seed=1).fingerprint != clip.fingerprint


def test_needs_a_square_vit():
    with pytest.raises(WeightsError, match="ViT"):
        FrozenClip(torch.nn.Linear(2, 2), None, "no CLIP")


# ------------------------------------------------------------------------------------------------ the bridge


def test_bridge_without_prompts_is_the_image_tower(clip, calls):
    patches = clip.model.visual.conv1(clip.preprocess(images()))
    bridged = clip.bridge(patches, patches.new_zeros(2, 0, 32), [])
    assert calls == [1, 1, 1, 1]
    torch.testing.assert_close(bridged, clip.features(images(), [3])[0][:, 0])


def test_bridge_appends_each_prompt_to_its_block_and_drops_it_after(clip):
    lengths, last = [], []
    for block in clip.model.visual.transformer.resblocks:
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        block.register_forward_pre_hook(lambda _, args: last.append(args[0][:, -1]))
    patches = torch.randn(2, 32, 4, 4, requires_grad=True)
    prompts = torch.randn(2, 2, 32, requires_grad=True)
    out = clip.bridge(patches, prompts, [2, 1])
    assert out.shape == (2, 32, 4, 4) and lengths == [17, 18, 18, 17]
    assert torch.equal(last[1], prompts[:, 1]) and torch.equal(last[2], prompts[:, 0])
    for gradient in torch.autograd.grad(out.square().sum(), [patches, prompts]):
        assert (gradient.flatten(1).abs().amax(1) > 0).all()
    assert not torch.equal(out, clip.bridge(patches, prompts * 2, [2, 1]))


@pytest.mark.parametrize(
    "patches, prompts, blocks",
    [
        ((2, 32, 5, 5), (2, 1, 32), [1]),
        ((2, 32, 4, 4), (2, 1, 32), [1, 2]),
        ((2, 32, 4, 4), (1, 1, 32), [1]),
        ((2, 32, 4, 4), (2, 1, 32), [4]),
        ((2, 32, 4, 4), (2, 2, 32), [1, 1]),
    ],
)
def test_bridge_refuses_what_does_not_fit(clip, patches, prompts, blocks):
    with pytest.raises(ValueError):
        clip.bridge(torch.zeros(patches), torch.zeros(prompts), blocks)


# -------------------------------------------------------------------------------------------- the vocabulary


def test_vocabulary_reads_words():
    vocabulary = Vocabulary.build(["A red-brown bird.", "a RED bird!", "a bird's wing"], context_length=6)
    assert vocabulary.words == ("a", "bird", "red")
    tokens = vocabulary(["a red zebra", "bird " * 9])
    assert tokens.tolist() == [[START, 3, 5, UNKNOWN, 6, PAD], [START, 4, 4, 4, 4, 6]]
    assert tokens.argmax(1).tolist() == [4, 5]  # where open_clip reads the sentence: the end token
    assert vocabulary.unknown("A red Zebra, zebra or bird") == ["zebra", "or"]
    assert vocabulary.share_cut(["a", "a a a a a"]) == 0.5


def test_vocabulary_survives_a_round_trip(tmp_path):
    vocabulary = Vocabulary(["red", "bleu", "größe"], 5)
    vocabulary.save(tmp_path / "v.json")
    again = Vocabulary.load(tmp_path / "v.json")
    assert again.words == vocabulary.words and again.context_length == 5 and len(again) == 7
    (tmp_path / "v.json").write_text("[]")
    with pytest.raises(WeightsError, match="v.json"):
        Vocabulary.load(tmp_path / "v.json")


def test_unknown_words_are_the_tokenizers(clip):
    assert clip.unknown_words("a green bird") == ["green"]
    clip.tokenizer = open_clip.get_tokenizer("ViT-B-32")
    assert clip.unknown_words("a green bird") == []


# --------------------------------------------------------------------------------------------------- loading


@pytest.fixture
def small_model(tmp_path, monkeypatch):
    """A tiny architecture that open_clip knows by name, with weights of it in a file."""
    config = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-quickgelu", config)
    torch.manual_seed(0)
    return open_clip.create_model("tiny-quickgelu", pretrained=None).eval()


def asked(**fields):
    return ClipSettings.model_construct(**{"source": "file", "model": "tiny-quickgelu", **fields})


def save_archive(model, path):
    """As OpenAI published its weights: TorchScript, the text mask a constant."""
    mask = model._buffers.pop("attn_mask")
    model.attn_mask = mask
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, (torch.zeros(1, 3, 32, 32), torch.ones(1, 77, dtype=torch.long))).save(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.load")
@pytest.mark.parametrize("ending", ["pt", "safetensors", "archive.pt"])
def test_local_file(small_model, tmp_path, ending):
    path = tmp_path / f"weights.{ending}"
    if ending == "safetensors":
        save_file(small_model.state_dict(), path)
    elif ending == "pt":
        torch.save({"state_dict": small_model.state_dict()}, path)
    else:
        save_archive(small_model, path)
    clip = load_clip(asked(path=path, normalisation="published"))
    assert clip.name == f"tiny-quickgelu/weights.{ending}" and clip.normalisation == "published"
    x = images()
    if ending == "archive.pt":  # OpenAI's own are stored in half precision, and open_clip reads all as such
        expected = small_model.encode_image(clip.preprocess(x))
        torch.testing.assert_close(clip.embed_images(x), expected, rtol=0.02, atol=0.02)
    else:
        torch.testing.assert_close(clip.embed_images(x), small_model.encode_image(clip.preprocess(x)))
        assert clip.fingerprint == FrozenClip(small_model, None).fingerprint
    assert clip.embed_text(["a bird"]).shape == (1, 16)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("pickled code was run",))


def test_unusable_files_end_in_one_sentence(small_model, tmp_path):
    good = small_model.state_dict()
    torch.save(good, tmp_path / "good.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:5000])
    (tmp_path / "text.safetensors").write_text("not weights")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({k: v for k, v in good.items() if k != "visual.proj"}, tmp_path / "missing.pt")
    torch.save({"code": Bomb()}, tmp_path / "bomb.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("cut.pt", "text.safetensors", "empty.pt", "missing.pt", "bomb.pt", "list.pt"):
        with pytest.raises(WeightsError, match=f"{name} is no intact checkpoint of clip.model=tiny"):
            load_clip(asked(path=tmp_path / name))
    with pytest.raises(WeightsError, match="good.pt is no intact checkpoint of clip.model=RN50"):
        load_clip(asked(path=tmp_path / "good.pt", model="RN50"))
    with pytest.raises(WeightsError, match="no such file"):
        load_clip(asked(path=tmp_path / "absent.pt"))
    with pytest.raises(WeightsError, match="no such architecture"):
        load_clip(asked(path=tmp_path / "good.pt", model="ViT-Z"))


@pytest.mark.filterwarnings("ignore:.*torch.jit.load")
def test_archive_of_another_architecture_is_refused(small_model, tmp_path, monkeypatch):
    path = tmp_path / "archive.pt"
    save_archive(small_model, path)
    with pytest.raises(WeightsError, match="-quickgelu"):
        load_clip(asked(path=path, model="ViT-B-32"))
    other = {**open_clip.factory._MODEL_CONFIGS["tiny-quickgelu"], "embed_dim": 8}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "other-quickgelu", other)
    with pytest.raises(WeightsError, match="another architecture"):
        load_clip(asked(path=path, model="other-quickgelu"))


def test_missing_download_says_what_to_fetch_and_where_to_put_it(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("HTTP Error 404: Not Found")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    monkeypatch.setattr(open_clip.factory, "CLIP", lambda *a, **k: pytest.fail("built before the download"))
    with pytest.raises(WeightsError) as caught:
        load_clip(asked(source="pretrained", model="ViT-B-32-quickgelu"))
    message = str(caught.value)
    for part in (
        "ViT-B-32-quickgelu/openai",
        "404",
        "open_clip_model.safetensors",
        "clip.source: file",
        "timm/vit_base_patch32_clip_224.openai",
        "clip.path",
        "demo",
    ):
        assert part in message
    assert "\n" not in message


def test_pretrained_weights_that_do_not_go_together():
    with pytest.raises(WeightsError, match="it has openai, "):
        load_clip(asked(source="pretrained", model="ViT-B-32-quickgelu", pretrained="nonsense"))
    with pytest.raises(WeightsError, match="set clip.model: ViT-B-32-quickgelu"):
        load_clip(asked(source="pretrained", model="ViT-B-32", pretrained="openai"))


def test_pretrained_goes_through_open_clip(small_model, tmp_path, monkeypatch):
    save_file(small_model.state_dict(), tmp_path / "w.safetensors")
    path = str(tmp_path / "w.safetensors")
    tag = {"file": path, "quick_gelu": True, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-quickgelu", {"openai": tag})
    clip = load_clip(asked(source="pretrained"))
    assert clip.name == "tiny-quickgelu/openai"
    assert np.allclose(clip.std.flatten(), 0.25)  # each tag brings its own


def test_train_source_needs_a_folder(tmp_path):
    with pytest.raises(WeightsError, match="name the folder"):
        load_clip(asked(source="train"))
    with pytest.raises(WeightsError, match="no small CLIP was trained here"):
        load_clip(asked(source="train"), tmp_path)
