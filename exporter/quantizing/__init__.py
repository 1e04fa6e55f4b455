"""`export --quantize`: rounds the weights of a checkpoint, and writes one that compressed-tensors reads."""

from qwenport.exporter.quantizing.recipe import Recipe, make_recipe

__all__ = ["Recipe", "make_recipe"]
