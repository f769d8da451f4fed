"""Diffusion DPO Workbench: preference optimisation of text-to-image diffusion models, tracked and analysed."""

__version__ = "0.1.0"
