"""Recipes of segmentation."""
