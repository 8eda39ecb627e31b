"""Affine transformations that carry the text into the feature maps: CAT, RAT and RAT as published.

All of them compute Affine(x | h) = gamma(h) * x + beta(h), one gamma and one beta for each channel, and
differ in the condition h alone:

* CAT: h = (latent, sentence), the same for every layer.
* RAT (the paper): h_t = the t-th hidden state of one LSTM that runs over the layers (`Recurrence`).
* RAT as published: each layer has its own LSTM, whose time axis is the batch (`OfficialRecurrentAffine`).
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

AffineFactory = Callable[[int], nn.Module]  # channels -> affine


def _scale_or_shift(condition_size: int, channels: int, start: float) -> nn.Sequential:
    """linear -> ReLU -> linear whose output is `start` whatever the condition, until it is trained."""
    first, last = nn.Linear(condition_size, channels), nn.Linear(channels, channels)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, start)
    return nn.Sequential(first, nn.ReLU(), last)


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


def affine_factories(condition_size: int, hidden_size: int) -> dict[str, AffineFactory]:
    """The affine of each conditioning by its name: `factories["rat"](channels)`. A new conditioning is a line here."""
    return {
        "cat": partial(ConditionalAffine, condition_size),
        "rat": partial(ConditionalAffine, hidden_size),
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
