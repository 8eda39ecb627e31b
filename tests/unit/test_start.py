"""How runs start: variants share the weights of their common layers, RAT's states get the spread of CAT's condition."""

import itertools
import math

import pytest
import torch

from ratlip.clip.frozen import shuffled
from ratlip.networks import Discriminator, Generator, Recurrence
from ratlip.networks.affine import RAT_INPUTS, rat_inputs, spread, spreads
from ratlip.settings import load_settings
from ratlip.studies import bench
from ratlip.training import generation, session, start
from ratlip.training.loop import train
from ratlip.training.step import sample_latents, training_step

CAT, RAT = {"model.conditioning": "cat"}, {}


@pytest.fixture
def build(smoke):
    """`build(overrides)` -> the fresh generator and discriminator of smoke with these settings."""

    def call(overrides=None, sentences=None):
        return session.build_networks(load_settings("smoke", overrides), smoke.workspace.clip, sentences)

    return call


def layers(network) -> dict:
    """Every layer with weights of its own: name -> its tensors."""
    found = {}
    for name, module in network.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            found[name] = own
    return found


def shapes(tensors: dict) -> dict:
    return {name: tensor.shape for name, tensor in tensors.items()}


def shared(one, other) -> tuple[list[str], list[str]]:
    """Layers of equal name and shapes in two networks, and those of them whose tensors are all equal."""
    a, b = layers(one), layers(other)
    alike = [name for name in a if name in b and shapes(a[name]) == shapes(b[name])]
    return alike, [name for name in alike if all(torch.equal(a[name][k], b[name][k]) for k in a[name])]


# --------------------------------------------------------------------------------------- weights by their names


VARIANTS = {
    "CAT": CAT,
    "RAT": RAT,
    "RAT h = 16": {"model.hidden_size": 16},
    "RAT in the mapper": {"model.rat_scope": "mapper"},
    "scaled": {"model.rat_input": "scaled"},
    "state-latent-sentence": {"model.rat_input": "state-latent-sentence"},
    "norm": {"model.attention": "norm"},
    "none": {"model.attention": "none"},
    "published": {"model.conditioning": "rat-official", "model.rat_scope": "mapper"},
}


@pytest.mark.parametrize("pair", list(itertools.combinations(VARIANTS, 2)), ids=" | ".join)
def test_layers_that_two_variants_share_start_equal(build, pair):
    (one, d_one), (other, d_other) = (build(VARIANTS[name]) for name in pair)
    alike, equal = shared(one, other)
    assert {"code", "mapper.to_clip", "mapper.prompts", "synthesis_blocks.0.fuse1.affine0.gamma.2"} <= set(alike)
    assert equal == alike
    assert shared(d_one, d_other) == (list(layers(d_one)), list(layers(d_other)))  # the whole discriminator


def test_cat_and_rat_differ_in_what_they_do_not_share_alone(build):
    cat, rat = build(CAT)[0], build(RAT)[0]
    alike, _ = shared(cat, rat)
    rest = {*layers(cat), *layers(rat)} - {*alike}
    assert rest == {name for name in layers(rat) if name.endswith((".gamma.0", ".beta.0")) or "recurrence" in name}


def test_attention_norm_and_none_have_the_same_convolutions(build):
    shuffle, norm, none = (layers(build({"model.attention": each})[0]) for each in ("shuffle", "norm", "none"))
    places = [name.removesuffix(".conv") for name in shuffle if name.endswith(".conv")]
    assert len(places) == 7  # one of the fusion block, two of each synthesis block
    for place in places:
        assert torch.equal(shuffle[f"{place}.conv"]["weight"], norm[f"{place}.conv"]["weight"])
        assert torch.equal(shuffle[f"{place}.conv"]["weight"], none[place]["weight"])


def test_weights_are_a_function_of_seed_network_and_name(build):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    (one, d_one), (again, d_again), (other, d_other) = (build({"seed": seed}) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers are left alone
    assert shared(one, again)[1] == list(layers(one)) and shared(d_one, d_again)[1] == list(layers(d_one))
    for mine, theirs in ((one, other), (d_one, d_other)):
        for (name, p), (_, q) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
            assert torch.equal(p, q) == (p.unique().numel() == 1), name  # random ones differ, constants are equal
    random = [p for p in (*one.parameters(), *d_one.parameters()) if p.unique().numel() > 1]
    for p, q in itertools.combinations(random, 2):  # and no two tensors of one start got the same numbers
        n = min(p.numel(), q.numel(), 50)
        a, b = p.detach().flatten()[:n], q.detach().flatten()[:n]
        if n >= 16:
            assert not torch.allclose(a / a.abs().max(), b / b.abs().max())


@pytest.mark.parametrize("name", ["RAT", "none", "published", "state-latent-sentence"])
def test_distributions_are_those_of_the_modules_own_start(smoke, build, name):
    """Beside networks as their constructors leave them: the same constants, the same range and spread."""
    settings = load_settings("smoke", {**VARIANTS[name], "model.base_channels": 32, "model.code_channels": 32})
    m, clip = settings.model, smoke.workspace.clip
    generator, discriminator = session.build_networks(settings, clip)
    torch.manual_seed(3)
    of_g = {each: getattr(m, each) for each in session.OF_GENERATOR}
    plain = Generator(clip, conditioning=m.effective_conditioning, **of_g)
    of_d = {each: getattr(m, each) for each in session.OF_DISCRIMINATOR}
    judge = Discriminator(grid=clip.grid, clip_width=clip.width, sentence_size=clip.embed_dim, **of_d)
    theirs, mine = (
        {f"{kind}.{key}": p.detach() for kind, network in enumerate(pair) for key, p in network.named_parameters()}
        for pair in ((plain, judge), (generator, discriminator))
    )
    assert mine.keys() == theirs.keys()
    large = 0
    for key, expected in theirs.items():
        if expected.unique().numel() == 1:
            assert torch.equal(mine[key], expected), key
        elif expected.numel() >= 1000:
            large += 1
            assert mine[key].std().item() == pytest.approx(expected.std().item(), rel=0.06), key
            assert mine[key].abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.02), key
            assert abs(mine[key].mean()) < 4 * expected.std() / expected.numel() ** 0.5, key
    assert large > 15


# -------------------------------------------------------------------------------------------- what RAT reads


def test_what_rat_reads_as_written():
    h, condition = list(torch.randn(3, 5, 4)), torch.randn(5, 7)
    assert rat_inputs(h, condition, "state", None) == h
    for mine, state in zip(rat_inputs(h, condition, "scaled", torch.tensor(3.0)), h, strict=True):
        assert torch.equal(mine, 3 * state)
    for mine, state in zip(rat_inputs(h, condition, "state-latent-sentence", None), h, strict=True):
        assert torch.equal(mine[:, :4], state) and torch.equal(mine[:, 4:], condition)


@pytest.mark.parametrize("rat_input", RAT_INPUTS)
@pytest.mark.parametrize("scope", ["mapper", "generator"])
def test_conditions_are_rats_as_far_as_it_reaches_and_then_cats(build, smoke, scope, rat_input):
    generator, _ = build({"model.rat_scope": scope, "model.rat_input": rat_input}, smoke.workspace.sentences())
    z, s = torch.randn(2, 8), torch.randn(2, 32)
    seen, steps = generator.conditions(z, s), generator.recurrence.steps
    assert len(seen) == 4 * (1 + 3) and steps == (16 if scope == "generator" else 4)
    size = {"state": 8, "scaled": 8, "state-latent-sentence": 8 + 8 + 32}[rat_input]
    assert [c.shape[1] for c in seen] == [size] * steps + [40] * (16 - steps)
    for c in seen[steps:]:
        assert torch.equal(c, torch.cat((z, s), dim=1))


def test_spread_is_the_root_of_the_mean_variance():
    samples = torch.randn(20_000, 3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 4.0]) + 5
    assert float(spread(samples)) == pytest.approx(math.sqrt((1 + 4 + 16) / 3), rel=0.02)
    both = spread(torch.stack([samples, 3 * samples]))
    torch.testing.assert_close(both, spread(samples) * torch.tensor([1.0, 3.0], dtype=torch.float64))


def test_conditions_of_equal_spread_move_a_fresh_layer_equally_far():
    """Why the root mean square: one input of 10 among nine of 0 does as much as ten of 10 / sqrt(10)."""
    torch.manual_seed(0)
    one = torch.zeros(4000, 10).index_copy_(1, torch.tensor([0]), 10 * torch.randn(4000, 1))
    ten, wide = torch.randn(4000, 10) * 10 / 10**0.5, torch.randn(4000, 90) * 10 / 10**0.5
    moved = []
    for samples in (one, ten, wide):
        assert spread(samples) == pytest.approx(10 / 10**0.5, rel=0.03)
        moved.append(float(spread(torch.nn.Linear(samples.shape[1], 4000)(samples)).detach()))
    assert moved == pytest.approx([10 / 30**0.5] * 3, rel=0.05)


def test_the_factor_brings_the_state_to_the_spread_of_cats_condition(build, smoke):
    """By the definition, worked out anew: over captions at one latent, then the mean over latents and layers."""
    sentences = smoke.workspace.sentences()
    generator, _ = build({"model.rat_input": "scaled"}, sentences)
    rows = torch.linspace(0, len(sentences) - 1, 1024).long() if len(sentences) > 1024 else torch.arange(len(sentences))
    found = {"cat": [], "read": []}
    for z in sample_latents(0, start.START, start.LATENTS, 8):
        both = torch.cat((z.expand(len(rows), -1), sentences[rows]), dim=1)
        found["cat"].append(both.var(0).mean().sqrt())
        found["read"].append(
            torch.stack([c.var(0).mean().sqrt() for c in generator.conditions(*both.split([8, 32], 1))])
        )
    cat, read = torch.stack(found["cat"]).mean(), torch.stack(found["read"]).mean()
    assert read.item() == pytest.approx(cat.item(), rel=1e-4)
    assert generator.state_scale > 1.2
    again, _ = build({"model.rat_input": "scaled"}, sentences)
    assert torch.equal(again.state_scale, generator.state_scale)
    assert not torch.equal(build({"model.rat_input": "scaled", "seed": 1}, sentences)[0].state_scale, again.state_scale)


def test_spreads_of_a_recurrence_that_is_known():
    """States that are a tenth of what the first sentence number is, at all t: CAT's condition is ten times as wide."""

    class Tenth(Recurrence):
        def forward(self, latent, sentence):
            return [sentence / 10] * 3

    recurrence = Tenth(sentence_size=6, latent_size=2, hidden_size=6, steps=3)
    found = spreads(recurrence, torch.randn(4, 2), torch.randn(50, 6))
    assert found["factor"] == pytest.approx(10 * math.sqrt(6 / 8), rel=1e-5)  # two of CAT's eight are latents, held


def test_only_scaled_has_a_scale_and_it_cannot_be_forgotten(build, smoke):
    for overrides in (CAT, RAT, {"model.rat_input": "state-latent-sentence"}, {**CAT, "model.rat_input": "scaled"}):
        generator, _ = build(overrides, smoke.workspace.sentences())
        assert generator.state_scale is None and "state_scale" not in generator.state_dict()
    forgotten, _ = build({"model.rat_input": "scaled"})
    assert forgotten.state_scale.isnan()
    assert start.match_spread(build(CAT)[0], smoke.workspace.sentences(), 0) is None
    bare = build(RAT)[0]
    scaled = build({"model.rat_input": "scaled"}, smoke.workspace.sentences())[0]
    told = start.match_spread(bare, smoke.workspace.sentences(), 0)
    assert bare.state_scale is None and told["factor"] == pytest.approx(float(scaled.state_scale))


@pytest.fixture(scope="module")
def scaled_run(smoke, tmp_path_factory):
    """A finished run of smoke with scaled states, and its workspace's folder of outputs."""
    settings = load_settings("smoke", {"model.rat_input": "scaled", "training.steps": 3})
    w, folder = smoke.workspace, tmp_path_factory.mktemp("scaled") / "run"
    return train(settings, w.prepared, w.clip, w.sentences(), folder, accelerator="cpu", progress=False)


def test_a_checkpoint_carries_the_scale_unchanged(build, smoke, scaled_run):
    fresh, _ = build({"model.rat_input": "scaled"}, smoke.workspace.sentences())
    networks = session.read_checkpoint(scaled_run / "checkpoint.pt", "cpu")["networks"]
    assert torch.equal(networks["generator"]["state_scale"], fresh.state_scale)
    assert torch.equal(networks["average"]["module.state_scale"], fresh.state_scale)
    run = generation.Run(scaled_run, device="cpu", clip_folder=smoke.workspace.clip_folder)
    assert torch.equal(run.generator.state_scale, fresh.state_scale)
    assert run.generate("a large red ring on a black background").isfinite().all()
    facts = (scaled_run / "provenance.json").read_text()
    assert f'"state_scale": {float(fresh.state_scale)}' in facts


# ------------------------------------------------------------------------------------------ clip in either network


def test_without_the_bridge_clip_and_prompts_have_no_say(build):
    with_bridge, without = (build({**CAT, "model.bridge_scale": scale})[0].eval() for scale in (0.3, 0.0))
    z, s = torch.randn(2, 8), torch.randn(2, 32)
    for generator, unmoved in ((with_bridge, False), (without, True)):
        with torch.no_grad():
            before = generator(z, s)
            for parameter in generator.mapper.prompts.parameters():
                parameter.add_(1)
            assert torch.equal(generator(z, s), before) == unmoved
    mapper = without.mapper
    mapper._clip.value.bridge, kept = lambda patches, *_: torch.ones_like(patches), mapper._clip.value.bridge
    try:
        assert torch.equal(without(z, s), before)
    finally:
        del mapper._clip.value.bridge
    assert mapper._clip.value.bridge == kept


def test_the_discriminator_alone_sees_through_a_random_tower(tmp_path):
    """Generator's forward pass and embedding by CLIP, D's features by the other; the plain step agrees."""
    random = {"model.discriminator_tower": "random"}
    clip_run, run = bench.world("smoke", 4, tmp_path / "a"), bench.world("smoke", 4, tmp_path / "b", random)
    session_ = run.run
    assert clip_run.run.tower is clip_run.run.clip and session_.tower is not session_.clip
    assert (
        session_.clip.fingerprint == clip_run.run.clip.fingerprint == session_.generator.mapper._clip.value.fingerprint
    )
    assert session_.tower.fingerprint == shuffled(session_.clip, session_.settings.seed).fingerprint
    other = bench.world("smoke", 4, tmp_path / "c", {**random, "seed": 1}).run
    assert other.tower.fingerprint != session_.tower.fingerprint
    seen = {"clip": 0, "tower": 0}
    for name in seen:
        module = getattr(session_, name)
        features, embed = module.features, module.embed_images

        def counted(*arguments, name=name, original=features, **options):
            seen[name] += 1
            return original(*arguments, **options)

        def embedded(*arguments, name=name, original=embed):
            assert name == "clip"
            return original(*arguments)

        module.features, module.embed_images = counted, embedded
    batch = run.batches[0]
    d_random, g_random = training_step(session_, batch)
    d_clip, g_clip = training_step(clip_run.run, clip_run.batches[0])
    assert seen == {"clip": 0, "tower": 2}
    torch.testing.assert_close(g_random.similarity, g_clip.similarity, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(d_random.total, d_clip.total, rtol=1e-4)
    assert all(p.grad is None and not p.requires_grad for p in session_.tower.parameters())
    plain = bench.world("smoke", 4, tmp_path / "d", random, form="plain")
    d_plain, g_plain = plain.step()
    torch.testing.assert_close(d_plain.total, d_random.total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(g_plain.total, g_random.total, rtol=1e-4, atol=1e-5)
