"""Where a training step's time goes: seconds and floating-point operations of each part, and the machine's rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ratlip.data.batches import to_network
from ratlip.fast.tower import frozen_linear
from ratlip.networks.generator import AFFINES
from ratlip.networks.losses import generator_loss, hinge, ma_gp
from ratlip.training.session import Session
from ratlip.training.step import mismatch, sample_latents


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, size: int = 2048, repeats: int = 7) -> float:
    """Floating-point operations a second of a large float32 product, the best of the ways there are."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    ways: list[Callable[[], Tensor]] = [lambda: a @ b, lambda: frozen_linear(a, b, None)]
    best = float("inf")
    for way in ways:
        for _ in range(repeats):
            synchronise(device)
            start = time.perf_counter()
            way()
            synchronise(device)
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _linear(x: Tensor, weight: Tensor, *_, **__) -> int:
    return 2 * x.shape[0] * x.shape[1] * weight.shape[0]


def _attention(q: Tensor, k: Tensor, *_, **__) -> int:
    return 4 * q.numel() * k.shape[2]  # two products of (length, width) and (width, length)


def _attention_backward(_grad: Tensor, q: Tensor, k: Tensor, *_, **__) -> int:
    return _attention(q, k) * 5 // 2  # five products


OWN_FORMULAS = {
    name: formula
    for library, name, formula in (
        (torch.ops.mkldnn, "_linear_pointwise", _linear),
        (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", _attention),
        (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", _attention_backward),
    )
    if hasattr(library, name)
}


class Operations(TorchDispatchMode):
    """Counts operations of products, convolutions and attention, by PyTorch's own formulas where it has one.

    `FlopCounterMode`, which owns the formulas, also watches modules and for that refuses a gradient taken within a
    step, as the penalty takes one.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        packet = operation._overloadpacket
        if packet.__name__ in OWN_FORMULAS:
            self.total += OWN_FORMULAS[packet.__name__](*args)
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


def count_operations(work: Callable[[], object]) -> int:
    """Floating-point operations of products and convolutions in `work()`; one multiplication and addition: 2."""
    with Operations() as counter:
        work()
    return counter.total


class Parts:
    """Adds up seconds or, with `count`, operations of named parts."""

    def __init__(self, device: torch.device, count: bool = False):
        self.device, self.count, self.totals = device, count, {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        synchronise(self.device)
        start = time.perf_counter()
        if self.count:
            with Operations() as counter:
                yield
            spent = counter.total
        else:
            yield
            synchronise(self.device)
            spent = time.perf_counter() - start
        self.totals[name] = self.totals.get(name, 0) + spent


def _leaf(*tensors: Tensor) -> list[Tensor]:
    """The same values, cut off from what made them, to gather gradients."""
    return [tensor.detach().requires_grad_() for tensor in tensors]


def _grads(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors]


def step_in_parts(run: Session, batches, part: Parts) -> None:
    """One step of ours as `training.training_step` computes it, cut at the borders of its parts."""
    t, m = run.settings.training, run.settings.model
    with part("data: read, crop, scale"):
        batch = batches[run.step]
        real = to_network(batch["images"].to(run.device), m.image_size, t.real_resize)
        numbers = batch["caption"].to(run.device)
        sentence = run.sentences[numbers]
        latent = sample_latents(run.settings.seed, run.draw, len(real), m.latent_size).to(run.device)
        wrong = mismatch(numbers, run.sentences, run.groups, t.mismatch, run.settings.seed, run.draw)
    fake, backward = _generate_in_parts(run.networks["generator"], latent, sentence, part)
    (image,) = _leaf(fake)
    with part("CLIP on generated images, forward"):
        features, embedding = run.clip.features(image, m.feature_blocks)
    with part("CLIP on real images, forward"), torch.no_grad():
        real_features, _ = run.clip.features(real, m.feature_blocks, embedding=False)

    _judge_in_parts(run, real_features, features.detach(), sentence, wrong, part)
    (seen,) = _leaf(features)
    (told,) = _leaf(embedding)
    with part("D for G's step, forward and backward"):
        frozen = run.networks["discriminator"].requires_grad_(False)
        generator_loss(frozen, seen, told, sentence, t.similarity_weight).total.backward()
        frozen.requires_grad_(True)
    with part("CLIP on generated images, backward"):
        torch.autograd.backward((features, embedding), _grads([seen, told]))
    run.optimiser_g.zero_grad()
    backward(image.grad)
    with part("optimisers"):
        run.optimiser_g.step()
        if "average" in run.networks:
            run.networks["average"].update_parameters(run.networks["generator"])
    run.step += 1


def _judge_in_parts(
    run: Session, real_features: Tensor, fake_features: Tensor, sentence: Tensor, wrong: Tensor, part: Parts
) -> None:
    """D's step, as `losses.discriminator_loss` has it."""
    t, discriminator = run.settings.training, run.networks["discriminator"]
    real_features, own = _leaf(real_features, sentence)
    with part("D, forward"):
        logits, wrong_logits = discriminator(real_features, own, wrong)
        fake = hinge(discriminator(fake_features, sentence), real=False)
        hinges = hinge(logits, real=True) + (fake + hinge(wrong_logits, real=False)) / 2
    with part("penalty: gradient for its inputs"):
        penalty = ma_gp(logits, real_features, own, t.penalty_weight, t.penalty_power)
    run.optimiser_d.zero_grad()
    with part("D and penalty, backward"):
        (hinges + penalty).backward()
    with part("optimisers"):
        run.optimiser_d.step()


def _generate_in_parts(generator, latent: Tensor, sentence: Tensor, part: Parts):
    """The generated images, and a function that takes their gradient back through the generator."""
    mapper = generator.mapper
    mapped = AFFINES * len(mapper.fusion_blocks)
    with part("mapper, forward"):
        condition = torch.cat((latent, sentence), dim=1)
        conditions = generator._conditions(latent, sentence, condition)
        x = generator.code(latent).unflatten(1, generator.code_shape)
        for i, block in enumerate(mapper.fusion_blocks):
            x = block(x, conditions[AFFINES * i : AFFINES * (i + 1)])
        x = mapper.to_clip(x)
        prompts = mapper.prompts(condition).view(len(x), len(mapper.prompt_blocks), x.shape[1])
    patches, tokens = _leaf(x, prompts)
    with part("CLIP as bridge, forward"):
        bridged = mapper._clip.value.bridge(patches, tokens, mapper.prompt_blocks)
    straight, crossed = _leaf(x, bridged)
    with part("mapper, forward"):
        start = mapper.from_clip(straight + mapper.scale * crossed)
    first, *states = _leaf(start, *conditions[mapped:])
    with part("synthesis blocks, forward"):
        y = first
        for i, block in enumerate(generator.synthesis_blocks):
            y = block(y, states[AFFINES * i : AFFINES * (i + 1)])
        images = generator.to_rgb(torch.nn.functional.leaky_relu(y, 0.2))

    def backward(grad: Tensor) -> None:
        with part("synthesis blocks, backward"):
            images.backward(grad)
        with part("mapper, backward"):
            start.backward(first.grad)
        with part("CLIP as bridge, backward"):
            bridged.backward(crossed.grad)
        with part("mapper, backward"):
            carried = [
                (made, state.grad)
                for made, state in zip(conditions[mapped:], states)
                if made.requires_grad and state.grad is not None
            ]
            torch.autograd.backward(
                (x, prompts, *(made for made, _ in carried)),
                (straight.grad + patches.grad, tokens.grad, *(g for _, g in carried)),
            )

    return images, backward
