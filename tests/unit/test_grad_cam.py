"""Class activation maps: right gradients, exact masks, numbers that mean what they say."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ratlip.clip.frozen import FrozenClip
from ratlip.data import synthetic
from ratlip.studies import compare, grad_cam
from ratlip.studies.grad_cam import (
    PAPER,
    Method,
    concentration,
    coverage,
    energy_on_object,
    margins,
    plausible,
    real_material,
    shuffled,
    similarity_maps,
    validate,
)


@pytest.fixture(scope="module")
def material(smoke):
    return real_material(smoke.workspace, "test", 6)


class OwnToken(nn.Module):
    """An attention by which every token reads itself alone."""

    def forward(self, q, k, v, need_weights, attn_mask):
        return (q,)


def one_patch_clip(clip: FrozenClip, patch: int) -> FrozenClip:
    """A copy whose embedding is that of one patch: tokens never meet, the pool reads patch number `patch`."""
    clip = shuffled(clip)
    visual = clip.model.visual
    for block in visual.transformer.resblocks:
        block.attn = OwnToken()
    visual.pool = lambda tokens: tokens[:, -(clip.grid**2) + patch]
    return clip


class TestMaps:
    def test_shape_range_and_one_scale_each(self, smoke, material):
        clip = smoke.workspace.clip
        for method in grad_cam.candidates(clip):
            maps = similarity_maps(clip, material.images, material.sentences, method)
            assert maps.shape == (6, 16, 16) and maps.dtype == torch.float32 and maps.device.type == "cpu"
            highest = maps.amax((1, 2))  # of a map that is negative everywhere, nothing is left
            assert maps.min() >= 0 and maps.max() <= 1 and ((highest == 0) | (highest > 0.5)).all(), method
            assert (highest > 0).sum() >= 2, method

    def test_equation_7_by_hand(self, smoke, material):
        """Grad-CAM from autograd alone, on the patch grid, enlarged as the package does."""
        cv2 = pytest.importorskip("cv2")
        clip, kept = smoke.workspace.clip, {}
        images = material.images.clone().requires_grad_()
        layer = clip.model.visual.transformer.resblocks[-1].ln_1
        hook = layer.register_forward_hook(lambda module, given, result: kept.update(a=result))
        cosine = F.cosine_similarity(clip.embed_images(images), material.sentences).sum()
        hook.remove()
        (gradient,) = torch.autograd.grad(cosine, kept["a"])
        weights = gradient[:, -16:].mean(1, keepdim=True)
        grid = (weights * kept["a"][:, -16:]).sum(2).clamp(min=0).detach().view(6, 4, 4).numpy()
        for expected, found in zip(
            grid, similarity_maps(clip, material.images, material.sentences, PAPER), strict=True
        ):
            for size in ((4, 4), (16, 16)):  # scaled before and after
                expected = cv2.resize(expected, size)
                expected = (expected - expected.min()) / (np.ptp(expected) + 1e-9)
            np.testing.assert_allclose(found, expected, atol=1e-3)

    @pytest.mark.parametrize("patch", [0, 6, 15])
    @pytest.mark.parametrize("cam", ["HiResCAM", "ScoreCAM"])
    def test_an_answer_that_hangs_on_one_patch_lights_it(self, smoke, material, patch, cam):
        """HiRes-CAM's gradient is zero elsewhere; Score-CAM keeps the channels that show this patch."""
        clip = one_patch_clip(smoke.workspace.clip, patch)
        images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with torch.no_grad():
            sentences = clip.embed_images(images)
        maps = similarity_maps(clip, images, sentences, Method(cam, -1, "projection"))
        lit = torch.zeros(4, 4)
        lit[patch // 4, patch % 4] = 1
        mask = F.interpolate(lit[None, None], size=16)[0].bool().expand(8, -1, -1)
        other = mask.roll((4, 4), (1, 2))
        if cam == "HiResCAM":
            assert (maps.amax((1, 2)) > 0).any()
            reach = F.max_pool2d(mask[:1].float(), 9, 1, 4).bool()  # bilinear: half a patch around it
            assert maps[:, ~reach[0]].abs().max() == 0
        else:
            assert energy_on_object(maps, mask).mean() > energy_on_object(maps, other).mean()

    def test_the_class_token_is_left_out_and_either_order_of_axes_is_read(self, smoke):
        tokens = torch.arange(2 * 17 * 3.0).view(2, 17, 3)
        grid = tokens[:, 1:].transpose(1, 2).reshape(2, 3, 4, 4)
        for first in (True, False):
            tower = SimpleNamespace(transformer=SimpleNamespace(batch_first=first))
            clip = SimpleNamespace(grid=4, model=SimpleNamespace(visual=tower))
            given = tokens if first else tokens.transpose(0, 1)
            assert torch.equal(grad_cam._patches(clip, given), grid)

    def test_batches_and_lengths_of_sentences_change_nothing(self, smoke, material):
        clip = smoke.workspace.clip
        whole = similarity_maps(clip, material.images, material.sentences)
        parts = similarity_maps(clip, material.images, 5 * material.sentences, batch_size=4)
        torch.testing.assert_close(whole, parts, atol=1e-4, rtol=0)

    def test_works_where_gradients_are_off_and_leaves_no_trace(self, smoke, material):
        clip = smoke.workspace.clip
        hooks = [len(module._forward_hooks) for module in clip.modules()]
        with torch.no_grad():
            assert similarity_maps(clip, material.images, material.sentences).any()
        assert [len(module._forward_hooks) for module in clip.modules()] == hooks
        assert not any(p.requires_grad or p.grad is not None for p in clip.parameters())
        assert similarity_maps(clip, material.images[:0], material.sentences[:0]).shape == (0, 16, 16)

    def test_a_clip_of_pretrained_kind(self):
        """Class token, patches of 8 px, open_clip's QuickGELU block: nothing is cut to the demo."""
        import open_clip

        torch.manual_seed(0)
        vision = {"image_size": 48, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8}
        text = {"context_length": 8, "vocab_size": 30, "width": 16, "layers": 1, "heads": 2}
        clip = FrozenClip(open_clip.CLIP(12, vision, text, quick_gelu=True), lambda texts: None)
        assert clip.model.visual.pool_type == "tok"
        maps = similarity_maps(clip, torch.rand(3, 3, 48, 48), torch.randn(3, 12))
        assert maps.shape == (3, 48, 48) and (maps.amax((1, 2)) > 0.5).any()

    def test_wrong_calls_are_refused(self, smoke, material):
        clip = smoke.workspace.clip
        with pytest.raises(ValueError, match="6 images and 5 sentences"):
            similarity_maps(clip, material.images, material.sentences[:5])
        with pytest.raises(ValueError, match="has the blocks 0 to 2"):
            similarity_maps(clip, material.images, material.sentences, Method(block=-4))
        with pytest.raises(ValueError, match="takes images"):
            similarity_maps(clip, material.images[..., :8], material.sentences)
        with pytest.raises(ValueError, match="'EigenCAM'"):
            Method("EigenCAM")


class TestNumbers:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 2:6] = True

    def test_a_uniform_map(self):
        flat = torch.full((1, 8, 8), 0.3)
        assert energy_on_object(flat, self.mask).item() == pytest.approx(0.25)
        assert coverage(flat, self.mask).item() == coverage(flat, ~self.mask).item() == 1
        assert concentration(flat).item() == pytest.approx(0, abs=1e-9)

    def test_a_map_on_the_object_alone(self):
        on = self.mask.float()
        assert energy_on_object(on, self.mask).item() == 1 and coverage(on, self.mask).item() == 1
        assert coverage(on, ~self.mask).item() == 0
        assert concentration(on).item() == pytest.approx(1 - np.log(16) / np.log(64))

    def test_a_map_of_zeros_says_nothing(self):
        none = torch.zeros(1, 8, 8)
        assert energy_on_object(none, self.mask).item() == 0.25
        assert coverage(none, self.mask).item() == 0
        assert concentration(none).item() == pytest.approx(0, abs=1e-9)

    def test_one_pixel(self):
        point = torch.zeros(1, 8, 8)
        point[0, 3, 3] = 0.01
        assert concentration(point).item() == pytest.approx(1)
        assert coverage(point, self.mask).item() == pytest.approx(1 / 16)
        assert coverage(point).item() == pytest.approx(1 / 64)

    def test_scale_does_not_matter_and_half_counts(self):
        values = torch.zeros(1, 8, 8)
        values[0, 2, 2:5] = torch.tensor([1.0, 0.5, 0.49])
        for factor in (1, 0.25):
            assert coverage(values * factor, self.mask).item() == pytest.approx(2 / 16)

    def test_overlap(self):
        assert grad_cam.overlap(self.mask, self.mask).item() == 1
        assert grad_cam.overlap(self.mask, ~self.mask).item() == 0
        assert grad_cam.overlap(self.mask, self.mask.roll(2, 2)).item() == pytest.approx(8 / 24)

    def test_shapes_are_checked(self):
        with pytest.raises(ValueError, match="of the same shape"):
            energy_on_object(torch.zeros(2, 8, 8), self.mask)


class TestMasks:
    def test_stored_masks_are_those_that_were_drawn(self, smoke):
        part = smoke.workspace.prepared.train
        numbers = [0, 7, 191]
        masks = grad_cam.real_masks(part, numbers, 16, 16)
        for number, mask in zip(numbers, masks, strict=True):
            rng = np.random.default_rng([smoke.settings.data.seed, 2, number])
            pixels, drawn = synthetic.render(part.attributes[number], 16, rng)
            np.testing.assert_array_equal(mask.numpy(), drawn)
            np.testing.assert_array_equal(part.image(number), pixels)

    def test_a_crop_cuts_image_and_mask_alike(self, smoke):
        part = smoke.workspace.prepared.train
        assert torch.equal(grad_cam.real_masks(part, [3], 12, 12)[0], torch.from_numpy(part.mask(3)[2:14, 2:14].copy()))
        assert grad_cam.real_masks(part, [3], 12, 24).shape == (1, 24, 24)

    def test_no_masks_for_photographs(self):
        assert grad_cam.real_masks(SimpleNamespace(mask=lambda n: None), [0, 1], 16, 16) is None

    def test_estimate_by_colour_against_the_truth(self, smoke):
        m = real_material(smoke.workspace, "train", 192)
        found = grad_cam.overlap(grad_cam.estimated_masks(m.images, m.backgrounds), m.masks)
        assert found.mean() > 0.95 and found.min() > 0.6
        others = m.backgrounds[1:] + m.backgrounds[:1]
        wrong = grad_cam.overlap(grad_cam.estimated_masks(m.images, others), m.masks)
        assert wrong.mean() < 0.6

    def test_nothing_drawn_is_no_object(self, smoke):
        m = real_material(smoke.workspace, "train", 40)
        grey = torch.full((2, 3, 16, 16), 125 / 127.5 - 1)
        masks = grad_cam.estimated_masks(grey, ["grey", "white"])
        assert masks.float().mean((1, 2)).tolist() == [0, 1]
        assert plausible(masks, m.masks).tolist() == [False, False] and plausible(m.masks, m.masks).all()


class TestValidation:
    def test_material_is_drawn_by_its_seed(self, smoke):
        one, same, other = (real_material(smoke.workspace, "train", 12, seed) for seed in (0, 0, 1))
        assert one.captions == same.captions != other.captions and torch.equal(one.images, same.images)
        assert len(real_material(smoke.workspace, "test", 1000)) == 48
        few = one.first(3)
        assert few.captions == one.captions[:3] and len(few.masks) == len(few.images) == len(few) == 3

    def test_shuffled_weights_are_the_same_values_elsewhere(self, smoke):
        clip = smoke.workspace.clip
        before, other = clip.fingerprint, shuffled(clip)
        assert other.fingerprint != before == FrozenClip(clip.model, clip.tokenizer).fingerprint
        for a, b in zip(clip.model.visual.parameters(), other.model.visual.parameters(), strict=True):
            assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)
        assert shuffled(clip).fingerprint == other.fingerprint != shuffled(clip, 1).fingerprint

    def test_the_controls(self, smoke, material, monkeypatch):
        """Maps that light the object for the right caption and nothing for another pass; blind ones fail."""
        m, clip = material, object()

        def perfect(asked, images, sentences, method):
            right = torch.equal(sentences, m.sentences) and asked is clip
            return m.masks.float() if right else torch.ones_like(m.masks, dtype=torch.float32)

        monkeypatch.setattr(grad_cam, "similarity_maps", perfect)
        energies = validate(clip, object(), m, PAPER)
        assert (energies["map"] == 1).all() and np.allclose(energies["wrong caption"], energies["area"])
        assert margins(energies)["beaten"].all()
        monkeypatch.setattr(grad_cam, "similarity_maps", lambda *_: m.masks.float())
        blind = margins(validate(clip, object(), m, PAPER))
        assert blind["beaten"].to_dict() == {
            "area": True,
            "wrong caption": False,
            "random weights": False,
            "another image": True,
        }
        assert not grad_cam.compare_methods(smoke.workspace.clip, m, [PAPER])["valid"].any()

    def test_a_lead_within_two_standard_errors_is_none(self):
        lead = np.random.default_rng(0).normal(0, 1, 100)
        lead = (lead - lead.mean()) / lead.std(ddof=1)  # mean 0, standard error 0.1
        energies = pd.DataFrame({name: 0.0 for name in grad_cam.CONTROLS}, index=range(100))
        for mean, beaten in ((0.19, False), (0.21, True), (-0.5, False)):
            found = margins(energies.assign(map=lead + mean))
            assert found["margin"].tolist() == pytest.approx([mean] * 4)
            assert found["se"].tolist() == pytest.approx([0.1] * 4) and set(found["beaten"]) == {beaten}


class TestSweep:
    frame = pd.DataFrame(
        {
            "label": ["h = 0", "h = 0", "h = 8", "h = 8"],
            "seed": [0, 1, 0, 1],
            "hidden_size": [0, 0, 8, 8],
            "method": "m",
            "coverage": [0.5, 0.52, 0.9, 0.921],
        }
    )

    def test_scores_of_a_run(self, smoke, monkeypatch):
        from ratlip.studies import grid
        from ratlip.training import generation

        m = real_material(smoke.workspace, "test", 10)
        run = generation.Run(smoke.run, device="cpu")
        all_of_them, few = grad_cam.drawn(run, m), grad_cam.drawn(run, m.first(4))
        torch.testing.assert_close(all_of_them[:4], few, atol=1e-5, rtol=0)
        monkeypatch.setattr(grid, "open_run", lambda workspace, row: run)
        monkeypatch.setattr(grad_cam, "drawn", lambda run, material: material.images)  # as if drawn perfectly
        row = pd.DataFrame([{"label": "h = 8", "seed": 0, "hidden_size": 8}])
        found = grad_cam.sweep(smoke.workspace, row, m, {"paper": PAPER}).iloc[0]
        expected = grad_cam.map_scores(similarity_maps(smoke.workspace.clip, m.images, m.sentences), m.masks)
        assert found["found"] == 1
        for name in ("coverage", "spill", "energy", "area", "concentration"):
            assert found[name] == pytest.approx(expected[name], abs=0.05), name
        blank = m.images.clone()
        blank[3] = 1
        monkeypatch.setattr(grad_cam, "drawn", lambda run, material: blank)
        less = grad_cam.sweep(smoke.workspace, row, m, {"paper": PAPER}).iloc[0]
        assert less["found"] == 0.9
        kept = torch.arange(10) != 3
        assert less["area"] == pytest.approx(m.masks[kept].double().mean().item(), abs=0.01)
        bare = grad_cam.Material(m.images, m.sentences, m.captions, None, None)
        found = grad_cam.sweep(smoke.workspace, row, bare, {"paper": PAPER})
        assert list(found)[4:] == ["coverage", "concentration"]

    def test_verdicts(self, monkeypatch):
        assert grad_cam.against_others(self.frame, "h = 8").loc["h = 0", "verdict"] == "undecided"  # a few seeds
        monkeypatch.setattr(compare, "FEWEST", 2)
        more = grad_cam.against_others(self.frame, "h = 8").loc["h = 0"]
        assert more["difference"] == pytest.approx(0.4005) and more["verdict"] == "supported"
        assert grad_cam.against_others(self.frame, "h = 0").loc["h = 8", "verdict"] == "contradicted"
        assert grad_cam.whole_object(self.frame, "h = 0")[1] == "contradicted"
        assert grad_cam.whole_object(self.frame, "h = 8") == (pytest.approx(0.9105), "undecided")
        none = self.frame.assign(coverage=float("nan"))
        assert grad_cam.against_others(none, "h = 8").loc["h = 0", "verdict"] == "undecided"
        assert grad_cam.whole_object(none, "h = 8")[1] == "undecided"
