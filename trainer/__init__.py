"""difftrain: a trainer for text-to-image latent diffusion. A run is a function of (config, step)."""

__version__ = "0.1.0"
