"""The benchmark's plain form is the same step as the fast one; what was made fast gives the same numbers; no times."""

import copy
import json
from dataclasses import fields

import pytest
import torch
from torch.nn import functional as F

from ratlip.fast import accelerate
from ratlip.fast.maps import conv3x3
from ratlip.fast.memory import keep_freed_memory, return_freed_memory
from ratlip.fast.networks import FAST, FastToRGB
from ratlip.fast.tower import FrozenAttention, FrozenLinear, accelerate_tower, frozen_linear
from ratlip.networks import ConvShuffle, Discriminator, Generator
from ratlip.studies import bench
from ratlip.studies.bench import count_operations, matrix_rate

VARIANTS = {
    "rat": {},
    "scaled": {"model.rat_input": "scaled"},
    "state-latent-sentence": {"model.rat_input": "state-latent-sentence", "model.rat_scope": "mapper"},
    "cat": {"model.conditioning": "cat", "model.attention": "none"},
    "published": {
        "model.conditioning": "rat-official",
        "model.rat_scope": "mapper",
        "training.mismatch": "roll",
        "model.unused_shortcuts": True,
        "training.ema": 0.0,
    },
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


@pytest.fixture
def bench_world(tmp_path):
    return lambda overrides=None, form="fast": bench.world("smoke", 4, tmp_path / form, overrides, form=form)


def moved(network):
    """Off the start, where affines are the identity and gates are shut."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def gradients_at_update(optimiser, network) -> dict:
    """Filled, at each update, with the gradients that it uses."""
    seen = {}
    optimiser.register_step_pre_hook(
        lambda *_: seen.update({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    )
    return seen


def test_plain_and_fast_are_the_same_step(bench_world, variant):
    worlds = {form: bench_world(variant, form) for form in bench.FORMS}
    seen, losses = {}, {}
    for form, world in worlds.items():
        optimisers = world.plain_step.optimisers if form == "plain" else world.run.optimisers
        for network, optimiser in optimisers.items():
            moved(world.run.networks[network])
            inner = getattr(optimiser, "optimizer", optimiser)
            seen[form, network] = gradients_at_update(inner, world.run.networks[network])
        losses[form] = world.step()
        assert world.run.step == 1
    for one, other in zip(losses["fast"], losses["plain"], strict=True):
        for field in fields(one):
            torch.testing.assert_close(getattr(one, field.name), getattr(other, field.name), rtol=1e-4, atol=1e-5)
    for network in ("generator", "discriminator"):
        mine, theirs = seen["fast", network], seen["plain", network]
        assert mine.keys() == theirs.keys() and len(mine) > 10
        after = [dict(worlds[form].run.networks[network].named_parameters()) for form in ("fast", "plain")]
        scale = max(grad.abs().max() for grad in theirs.values())
        for name, grad in theirs.items():
            torch.testing.assert_close(mine[name], grad, rtol=1e-3, atol=1e-5 * scale.item(), msg=name)
            sure = grad.abs() > 1e-3 * scale  # Adam turns a gradient of rounding errors into a full step
            torch.testing.assert_close(after[0][name][sure], after[1][name][sure], rtol=0, atol=1e-5, msg=name)


def test_plain_and_fast_draw_the_same_images(bench_world, variant):
    images = []
    for form in bench.FORMS:
        world = bench_world(variant, form)
        moved(world.run.networks["generator"])
        images.append(bench.draw(world, 3))
        assert world.run.networks["generator"].training
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-5)


class Bridge(torch.nn.Module):
    """A frozen CLIP as the generator sees it, in double precision."""

    grid, width, embed_dim, image_size = 4, 6, 5, 12

    def bridge(self, patches, prompts, prompt_blocks):
        return patches.tanh() + prompts.sum(dim=1)[:, :, None, None]


@pytest.mark.parametrize("attention", ["shuffle", "norm", "none"])
@pytest.mark.parametrize("conditioning", ["cat", "rat", "rat-official"])
@pytest.mark.parametrize("scope", ["mapper", "generator"])
def test_fast_and_plain_generators_are_the_same_function(conditioning, scope, attention):
    """Images and all gradients in double precision, sides doubled (4, 8) and not (8, 12): no other explanation."""
    torch.manual_seed(0)
    sizes = dict(latent_size=3, base_channels=4, code_channels=8, mapper_blocks=2, hidden_size=4, prompt_blocks=[0, 1])
    how = dict(conditioning=conditioning, rat_scope=scope, attention=attention, attention_groups=2)
    sizes["base_channels"] = 32 if scope == "mapper" else 4  # from 32 on, the last convolution has a form of its own
    plain = moved(Generator(Bridge(), **sizes, **how)).double()
    fast = copy.deepcopy(plain)
    accelerate(fast)
    inputs = [torch.randn(3, size, dtype=torch.float64, requires_grad=True) for size in (3, 5)]
    found = []
    for generator in (plain, fast):
        images = generator(*inputs)
        wanted = torch.autograd.grad(images.square().mean(), (*inputs, *generator.parameters()), allow_unused=True)
        found.append([images, *wanted, *generator.buffers()])
    assert sum(g is None for g in found[0]) == 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("unused", [False, True])
def test_fast_and_plain_discriminators_have_the_same_losses_and_gradients(unused):
    from ratlip.networks.losses import discriminator_loss, generator_loss

    torch.manual_seed(0)
    sizes = dict(grid=4, clip_width=6, sentence_size=5, d_channels=4, logit_channels=3)
    plain = moved(Discriminator(**sizes, unused_shortcuts=unused)).double()
    fast = copy.deepcopy(plain)
    accelerate(fast)
    real, fake = torch.randn(2, 2, 3, 6, 4, 4).double()
    sentence, embedding = torch.randn(2, 2, 5).double()
    fake.requires_grad_()
    found = []
    for network in (plain, fast):
        loss = discriminator_loss(network, real, fake, sentence, sentence.roll(-1, 0))
        grads = torch.autograd.grad(loss.total, tuple(network.parameters()), allow_unused=True)
        of_g = generator_loss(network, fake, embedding, sentence)
        kept = [g for g in grads if g is not None]
        found.append([*(getattr(loss, f.name) for f in fields(loss)), *kept, *torch.autograd.grad(of_g.total, fake)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_accelerate_keeps_keys_tensors_and_copies_and_can_be_undone(bench_world):
    generator = bench_world().run.networks["generator"]
    fast = [type(module) for module in generator.modules()]
    tensors = {key: tensor.data_ptr() for key, tensor in generator.state_dict().items()}
    assert set(fast) & set(FAST.values()) and not set(fast) & set(FAST)
    assert [type(module) for module in copy.deepcopy(generator).modules()] == fast
    accelerate(generator, on=False)
    assert not {type(module) for module in generator.modules()} & {*FAST.values(), FastToRGB}
    assert {key: tensor.data_ptr() for key, tensor in generator.state_dict().items()} == tensors
    accelerate(generator)
    accelerate(generator)
    assert [type(module) for module in generator.modules()] == fast


def test_parts_hold_the_time_and_all_operations_of_the_step(bench_world):
    worlds = {form: bench_world(form=form) for form in bench.FORMS}
    found = bench.parts(worlds, iterations=1)
    assert all(row["seconds"] > 0 for row in found["rows"])
    assert [row["part"] for row in found["rows"] if "backward" in row["part"]] == [
        "D and penalty, backward",
        "D, CLIP and generator, backward",
    ]
    total = found["step_operations"]["fast"]
    assert sum(row["operations"] for row in found["rows"]) == pytest.approx(total, rel=0.01)
    assert 0 < total < found["step_operations"]["plain"]


def test_operations_of_a_product_and_of_onednn_are_counted():
    x, weight = torch.randn(6, 5), torch.randn(7, 5)
    assert count_operations(lambda: x @ weight.T)[""] == 2 * 6 * 5 * 7
    assert count_operations(lambda: frozen_linear(x, weight, None))[""] == 2 * 6 * 5 * 7
    assert matrix_rate(torch.device("cpu"), size=64, repeats=2) > 0


def test_resized_convolution_under_autocast_is_pytorchs_own():
    conv, x = ConvShuffle(8, 8, groups=2), torch.randn(2, 8, 4, 4, requires_grad=True)
    accelerate(conv)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(x, 8)
        y.float().sum().backward()
    assert y.shape == (2, 8, 8, 8) and x.grad.isfinite().all()


def test_an_in_place_activation_leaves_the_map_before_it_alone():
    x = torch.randn(2, 3, 4, 4)
    kept = x.clone()
    conv3x3(x, torch.randn(3, 3, 3, 3), torch.randn(3), 8)
    assert torch.equal(x, kept)


def test_the_fast_tower_keeps_tensors_and_keys(bench_world):
    clip = bench_world().run.clip
    fast = {key: tensor.data_ptr() for key, tensor in clip.state_dict().items()}
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    block = clip.model.visual.transformer.resblocks[0]
    assert isinstance(block.attn, FrozenAttention) and isinstance(block.mlp.c_fc, FrozenLinear)
    mine = clip.embed_images(images)
    accelerate_tower(clip.model.visual, on=False)
    assert type(block.attn) is torch.nn.MultiheadAttention and type(block.mlp.c_fc) is torch.nn.Linear
    assert {key: tensor.data_ptr() for key, tensor in clip.state_dict().items()} == fast
    torch.testing.assert_close(mine, clip.embed_images(images), rtol=1e-4, atol=1e-5)


def test_frozen_linear_has_gradients_of_every_order_for_its_input():
    layer = FrozenLinear(5, 3).requires_grad_(False)
    x = torch.randn(4, 2, 5, requires_grad=True)
    for function in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        (first,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x)
        if function is layer:
            kept = first, second
    torch.testing.assert_close(kept, (first, second), rtol=1e-4, atol=1e-4)


def test_second_order_gradients_of_the_penalty_against_finite_differences():
    """What torch.compile would refuse or lose: the penalty's gradient for D's weights, in double precision."""
    from ratlip.networks.losses import ma_gp

    torch.manual_seed(0)
    discriminator = Discriminator(
        grid=4, clip_width=6, sentence_size=5, d_channels=4, logit_channels=3, gate=0.3
    ).double()
    features, sentence = torch.randn(2, 3, 6, 4, 4).double(), torch.randn(2, 5).double()

    def penalty(network):
        f, s = features.clone().requires_grad_(), sentence.clone().requires_grad_()
        return ma_gp(network(f, s), f, s, power=2.0)

    names = [name for name, _ in discriminator.named_parameters()]
    found = torch.autograd.grad(penalty(discriminator), discriminator.parameters(), allow_unused=True)
    grads = dict(zip(names, found, strict=True))
    step = 1e-6
    for name in ("logit.0.weight", "main.gamma", "blocks.0.beta", "blocks.1.residual.0.weight"):
        direction = torch.randn(dict(discriminator.named_parameters())[name].shape).double()
        values = []
        for sign in (1, -1):
            other = copy.deepcopy(discriminator)
            with torch.no_grad():
                dict(other.named_parameters())[name].add_(sign * step * direction)
            values.append(penalty(other).item())
        assert (grads[name] * direction).sum().item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


def test_memory_can_be_kept_and_given_back():
    before = torch.randn(100, 100)
    assert keep_freed_memory() == return_freed_memory() == keep_freed_memory(10)
    assert torch.equal(before, before.clone())
    keep_freed_memory()


@pytest.mark.slow
def test_the_benchmark_writes_its_report(tmp_path):
    out = tmp_path / "report.json"
    options = dict(batch=4, iterations=2, generation=(1, 2), progress=False)
    found = bench.run("smoke", **options, json_path=out)
    assert found["step"]["ratio"]["low"] <= found["step"]["ratio"]["median"] <= found["step"]["ratio"]["high"]
    assert {row["batch"] for row in found["generation"]} == {1, 2} and found["parts"]["rows"]
    printed = bench.report(found)
    assert "training step" in printed and "D, CLIP and generator, backward" in printed
    assert bench.report(json.loads(out.read_text())) == printed
