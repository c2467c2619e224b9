"""What introspective VAEs are compared with: no VAEs, but trained by the same loop on the same data and networks."""

from introvae.baselines.wgan_gp import WGANGP, WGANGPStep

__all__ = ["WGANGP", "WGANGPStep"]
