"""Train, sample and measure diffusion models of images."""

__version__ = "0.1.0"
