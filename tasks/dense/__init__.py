"""Detectors and segmenters on any backbone: necks, heads, losses, files. Torch and timm alone."""
