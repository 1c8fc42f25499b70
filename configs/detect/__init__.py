"""Recipes of detection and instance segmentation."""
