"""The networks: affines (CAT, RAT), shuffle attention, generator, discriminator."""

from ratlip.networks.affine import ConditionalAffine, OfficialRecurrentAffine, Recurrence
from ratlip.networks.attention import ConvShuffle, ShuffleAttention
from ratlip.networks.discriminator import Discriminator
from ratlip.networks.generator import Generator

__all__ = [
    "ConditionalAffine",
    "ConvShuffle",
    "Discriminator",
    "Generator",
    "OfficialRecurrentAffine",
    "Recurrence",
    "ShuffleAttention",
]
