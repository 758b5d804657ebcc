"""Networks: tensors in, tensors out. They know nothing of diffusion, nor of how many machines they run on."""

from iddpm.nn.classifier import Classifier
from iddpm.nn.layers import timestep_embedding
from iddpm.nn.networks import Asked
from iddpm.nn.unet import GivenUNet, UNet, attention_rates, channel_mult_for

__all__ = ["Asked", "Classifier", "GivenUNet", "UNet", "attention_rates", "channel_mult_for", "timestep_embedding"]
