"""Affine transformations that carry the text into the feature maps: CAT, RAT and RAT as published.

All of them compute Affine(x | h) = gamma(h) * x + beta(h), one gamma and one beta for each channel, and
differ in the condition h alone:

* CAT: h = (latent, sentence), the same for every layer.
* RAT (the paper): h_t = the t-th hidden state of one LSTM that runs over the layers (`Recurrence`); or, on request,
  that state brought to the spread of CAT's condition, or beside it (`rat_inputs`: ours, not the paper's).
* RAT as published: each layer has its own LSTM, whose time axis is the batch (`OfficialRecurrentAffine`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

AffineFactory = Callable[[int], nn.Module]  # channels -> affine
RAT_INPUTS = ("state", "scaled", "state-latent-sentence")


class _Constant(nn.Linear):
    """A linear layer whose output is `start` whatever comes in, until it is trained."""

    def __init__(self, size: int, start: float):
        self.start = start
        super().__init__(size, size)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.start)


def _scale_or_shift(condition_size: int, channels: int, start: float) -> nn.Sequential:
    """linear -> ReLU -> linear whose output is `start` until it is trained."""
    return nn.Sequential(nn.Linear(condition_size, channels), nn.ReLU(), _Constant(channels, start))


class ConditionalAffine(nn.Module):
    """Affine(x | h) = gamma(h) * x + beta(h); gamma, beta: linear, ReLU, linear (paper, Method 1).

    With h = (latent, sentence) this is CAT; with h = h_t of a `Recurrence` it is the affine of RAT. Starts
    as the identity: the last layers have weight 0 and bias 1 (gamma) or 0 (beta).
    """

    def __init__(self, condition_size: int, channels: int):
        super().__init__()
        self.gamma = _scale_or_shift(condition_size, channels, start=1.0)
        self.beta = _scale_or_shift(condition_size, channels, start=0.0)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B,C,H,W), condition (B,D) or (1,D) for one shared by the batch -> (B,C,H,W)."""
        gamma, beta = self.gamma(condition)[:, :, None, None], self.beta(condition)[:, :, None, None]
        return gamma * x + beta


class OfficialRecurrentAffine(ConditionalAffine):
    """RAT as the published code computes it (differences 1 and 2); kept for its checkpoints.

    The conditions of a batch, (B,D), go as (1,B,D) to an LSTM of the layer's own: the batch is the time
    axis. So a single last state sets gamma and beta for every sample of the batch, made from all of
    them, the last most, and nothing is handed from layer to layer.
    """

    def __init__(self, condition_size: int, hidden_size: int, channels: int):
        super().__init__(hidden_size, channels)
        self.lstm = nn.LSTM(condition_size, hidden_size, batch_first=True)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B,C,H,W), condition (B,D) -> (B,C,H,W), all samples with the same scale and shift."""
        _, (state, _) = self.lstm(condition[None])
        return super().forward(x, state[0])


def affine_factories(condition_size: int, hidden_size: int, rat_input: str = "state") -> dict[str, AffineFactory]:
    """The affine of each conditioning by its name: `factories["rat"](channels)`. A new conditioning is a line here."""
    beside = condition_size if rat_input == "state-latent-sentence" else 0
    return {
        "cat": partial(ConditionalAffine, condition_size),
        "rat": partial(ConditionalAffine, hidden_size + beside),
        "rat-official": partial(OfficialRecurrentAffine, condition_size, hidden_size),
    }


class Recurrence(nn.Module):
    """The LSTM that connects the fusion blocks (paper, Method 1): one cell, one step before each affine.

    (h_0, c_0) = linear(latent)
    (h_t, c_t) = LSTM(sentence, h_{t-1}, c_{t-1}),   t = 1 .. steps

    The text enters at every step and the feature maps at none: all states are known before the first convolution.
    """

    def __init__(self, *, sentence_size: int, latent_size: int, hidden_size: int, steps: int):
        super().__init__()
        self.steps = steps
        self.initial = nn.Linear(latent_size, 2 * hidden_size)
        self.cell = nn.LSTMCell(sentence_size, hidden_size)

    def forward(self, latent: Tensor, sentence: Tensor) -> list[Tensor]:
        """latent (B,Z), sentence (B,E) -> the hidden states h_1 .. h_steps, each (B,H)."""
        state = self.initial(latent).chunk(2, dim=1)
        states = []
        for _ in range(self.steps):
            state = self.cell(sentence, state)
            states.append(state[0])
        return states


def rat_inputs(states: list[Tensor], condition: Tensor, rat_input: str, scale: Any) -> list[Tensor]:
    """What RAT's affines read, c_1 .. c_T, from the states h_1 .. h_T (B,H) and condition = (latent, sentence) (B,D).

    "state" (the paper):      c_t = h_t
    "scaled":                 c_t = scale * h_t, one number for all t
    "state-latent-sentence":  c_t = (h_t, latent, sentence)

    Why: at the start, an LSTM's state moves far less from caption to caption than CAT's condition does, so that the
    same step of the optimiser turns gamma and beta less. One number for all t is another unit for the state: the
    course of the states over the layers stays as the LSTM makes it, and only their size is CAT's.
    """
    if rat_input == "scaled":
        return [scale * state for state in states]
    if rat_input == "state-latent-sentence":
        return [torch.cat((state, condition), dim=1) for state in states]
    return states


def spread(conditions: Tensor) -> Tensor:
    """How far N samples move a condition (...,N,D): root of the mean over D of the variance over N -> (...).

    Root mean square, for so a linear layer with weights of variance 1/(3 D), as PyTorch starts it, adds up its inputs:
    conditions of equal spread move its outputs equally far, whatever their sizes D are.
    """
    return conditions.var(dim=-2).mean(dim=-1).sqrt()


@torch.no_grad()
def spreads(recurrence: Recurrence, latents: Tensor, sentences: Tensor) -> dict[str, float]:
    """How far captions move CAT's condition and RAT's state: {"cat", "state", "factor" = cat / state}.

    latents (L,Z), sentences (N,E) of N captions. Each is the `spread` over the captions of one latent, averaged over
    the latents and, for the states, over t = 1 .. T.
    """
    pairs = [(z.expand(len(sentences), -1), sentences) for z in latents]
    cat = float(torch.stack([spread(torch.cat(pair, dim=1)) for pair in pairs]).mean())
    state = float(torch.stack([spread(torch.stack(recurrence(*pair))) for pair in pairs]).mean())
    return {"cat": cat, "state": state, "factor": cat / state}
