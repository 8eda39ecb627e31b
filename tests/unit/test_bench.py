"""The benchmark's plain form is the same step as ours; what was made fast gives the same numbers; nothing is timed."""

import copy
import json
from dataclasses import fields

import pytest
import torch
from torch.nn import functional as F

from ratlip.fast.maps import phase_kernels, resized_conv3x3
from ratlip.fast.memory import keep_freed_memory, return_freed_memory
from ratlip.fast.tower import FrozenAttention, FrozenLinear, frozen_linear
from ratlip.networks import ConvShuffle, Discriminator, ShuffleAttention
from ratlip.networks.attention import Conv3x3
from ratlip.studies import bench
from ratlip.studies.bench_parts import Parts, count_operations, matrix_rate, step_in_parts
from ratlip.studies.bench_plain import plain_generate, plain_optimisers, plain_step
from ratlip.training.step import training_step

ARMS = {
    "rat": {},
    "cat": {"model.conditioning": "cat", "model.attention": "none"},
    "published": {
        "model.conditioning": "rat-official",
        "model.rat_scope": "mapper",
        "training.mismatch": "roll",
        "model.unused_shortcuts": True,
        "training.ema": 0.0,
    },
}


@pytest.fixture(params=ARMS)
def variant(request):
    return ARMS[request.param]


@pytest.fixture
def bench_world(tmp_path):
    return lambda overrides=None: bench.world("smoke", 4, tmp_path, overrides)


def moved(network):
    """Off the start, where affines are the identity and gates are shut."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def gradients_at_update(optimiser, network) -> dict:
    """Filled, at each update, with the gradients that it uses."""
    seen = {}
    optimiser.register_step_pre_hook(
        lambda *_: seen.update({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    )
    return seen


def test_plain_and_ours_are_the_same_step(bench_world, variant):
    ours, plain = bench_world(variant), bench_world(variant)
    optimisers = {"ours": ours.run.optimisers, "plain": plain_optimisers(plain.run)}
    seen, losses = {}, {}
    for name, world in (("ours", ours), ("plain", plain)):
        for network in ("generator", "discriminator"):
            moved(world.run.networks[network])
            inner = optimisers[name][network]
            seen[name, network] = gradients_at_update(getattr(inner, "optimizer", inner), world.run.networks[network])
    batch = ours.batches[0]
    losses["ours"] = training_step(ours.run, batch)
    plain.towers.use(plain=True)
    losses["plain"] = plain_step(plain.run, batch, optimisers["plain"], plain.captions)
    for one, other in zip(losses["ours"], losses["plain"], strict=True):
        for field in fields(one):
            torch.testing.assert_close(getattr(one, field.name), getattr(other, field.name), rtol=1e-4, atol=1e-5)
    for network in ("generator", "discriminator"):
        mine, theirs = seen["ours", network], seen["plain", network]
        assert mine.keys() == theirs.keys() and len(mine) > 10
        after = [dict(world.run.networks[network].named_parameters()) for world in (ours, plain)]
        scale = max(grad.abs().max() for grad in theirs.values())
        for name, grad in theirs.items():
            torch.testing.assert_close(mine[name], grad, rtol=1e-3, atol=1e-5 * scale.item(), msg=name)
            sure = grad.abs() > 1e-3 * scale  # Adam turns a gradient of rounding errors into a full step
            torch.testing.assert_close(after[0][name][sure], after[1][name][sure], rtol=0, atol=1e-5, msg=name)


def test_plain_generation_draws_the_same_images(bench_world, variant):
    world = bench_world(variant)
    generator = world.run.networks["generator"].eval()
    moved(generator)
    latent, sentence = world.inputs(3)
    with torch.no_grad():
        torch.testing.assert_close(
            plain_generate(generator, latent, sentence), generator(latent, sentence), rtol=1e-4, atol=1e-5
        )


def test_a_step_in_parts_is_a_step(bench_world):
    whole, cut = bench_world(), bench_world()
    seen = {}
    for name, here in (("whole", whole), ("cut", cut)):
        for network, optimiser in here.run.optimisers.items():
            moved(here.run.networks[network])
            seen[name, network] = gradients_at_update(
                getattr(optimiser, "optimizer", optimiser), here.run.networks[network]
            )
    training_step(whole.run, whole.batches[0])
    part = Parts(cut.run.device)
    step_in_parts(cut.run, cut.batches, part)
    assert cut.run.step == whole.run.step == 1 and all(seconds >= 0 for seconds in part.totals.values())
    for network in ("generator", "discriminator"):
        one, other = seen["cut", network], seen["whole", network]
        assert one.keys() == other.keys() and len(one) > 10
        for key, grad in other.items():
            torch.testing.assert_close(one[key], grad, rtol=1e-3, atol=1e-6, msg=key)


def test_the_parts_count_all_operations_of_the_step(bench_world):
    world = bench_world()
    part = Parts(world.run.device, count=True)
    step_in_parts(world.run, world.batches, part)
    batch = world.batches[1]
    assert sum(part.totals.values()) == pytest.approx(
        count_operations(lambda: training_step(world.run, batch)), rel=0.01
    )


def test_operations_of_a_product_and_of_onednn_are_counted():
    x, weight = torch.randn(6, 5), torch.randn(7, 5)
    assert count_operations(lambda: x @ weight.T) == 2 * 6 * 5 * 7
    assert count_operations(lambda: frozen_linear(x, weight, None)) == 2 * 6 * 5 * 7
    assert matrix_rate(torch.device("cpu"), size=64, repeats=2) > 0


@pytest.mark.parametrize("side, size", [(1, 2), (3, 6), (8, 16), (4, 7), (7, 8), (5, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_convolution_after_resizing(side, size, bias):
    """Values and gradients, borders included, in double precision: to 1e-10 there is no other explanation."""
    torch.manual_seed(0)
    conv = Conv3x3(3, 4, bias=bias).double()
    x = torch.randn(2, 3, side, side, dtype=torch.float64, requires_grad=True)
    mine = conv(x, size)
    theirs = F.conv2d(F.interpolate(x, size=(size, size)), conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    wanted = (x, *conv.parameters())
    upstream = torch.randn_like(theirs)
    for one, other in zip(
        torch.autograd.grad(mine, wanted, upstream), torch.autograd.grad(theirs, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_phase_kernels_have_the_sums_of_the_kernels():
    weight = torch.randn(4, 3, 3, 3)
    kernels = phase_kernels(weight)
    assert kernels.shape == (16, 3, 2, 2)
    for part in kernels.chunk(4):
        torch.testing.assert_close(part.sum((2, 3)), weight.sum((2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 3, 8])
def test_shuffle_attention_in_few_passes(groups):
    torch.manual_seed(0)
    attention = ShuffleAttention(48, groups).double()
    moved(attention)
    x = (3 + torch.randn(2, 48, 5, 4, dtype=torch.float64)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # only to take the other branch: doubles are not cast
        theirs = attention(x)
    mine = attention(x)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    upstream = torch.randn_like(mine)
    wanted = (x, *attention.parameters())
    for one, other in zip(torch.autograd.grad(mine, wanted, upstream), torch.autograd.grad(theirs, wanted, upstream)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_resized_convolution_under_autocast_is_pytorchs_own():
    conv, x = ConvShuffle(8, 8, groups=2), torch.randn(2, 8, 4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(x, 8)
        y.float().sum().backward()
    assert y.shape == (2, 8, 8, 8) and x.grad.isfinite().all()


def test_an_in_place_activation_leaves_the_map_before_it_alone():
    x = torch.randn(2, 3, 4, 4)
    kept = x.clone()
    resized_conv3x3(x, torch.randn(3, 3, 3, 3), torch.randn(3), 8)
    assert torch.equal(x, kept)


def test_the_lean_tower_keeps_tensors_and_keys(bench_world):
    world = bench_world()
    world.towers.use(plain=False)
    lean = {key: tensor.data_ptr() for key, tensor in world.run.clip.state_dict().items()}
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    block = world.run.clip.model.visual.transformer.resblocks[0]
    assert isinstance(block.attn, FrozenAttention) and isinstance(block.mlp.c_fc, FrozenLinear)
    mine = world.run.clip.embed_images(images)
    world.towers.use(plain=True)
    assert {key: tensor.data_ptr() for key, tensor in world.run.clip.state_dict().items()} == lean
    torch.testing.assert_close(mine, world.run.clip.embed_images(images), rtol=1e-4, atol=1e-5)


def test_frozen_linear_has_gradients_of_every_order_for_its_input():
    layer = FrozenLinear(torch.nn.Linear(5, 3).requires_grad_(False))
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
    grads = dict(zip(names, torch.autograd.grad(penalty(discriminator), discriminator.parameters(), allow_unused=True)))
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
def test_the_benchmark_writes_its_report(tmp_path, capsys):
    out = tmp_path / "report.json"
    bench.main(
        [
            "--profile",
            "smoke",
            "--batch",
            "4",
            "--iterations",
            "2",
            "--generation",
            "1",
            "2",
            "--no-memory",
            "--scaling",
            "--out",
            str(out),
        ]
    )
    found = json.loads(out.read_text())
    assert found["step"]["ratio"]["low"] <= found["step"]["ratio"]["median"] <= found["step"]["ratio"]["high"]
    assert {row["batch"] for row in found["generation"]} == {1, 2} and found["parts"]["rows"]
    printed = capsys.readouterr().out
    assert "training step" in printed and "CLIP as bridge, backward" in printed
    bench.main(["--show", str(out)])
    assert capsys.readouterr().out.strip() in printed
