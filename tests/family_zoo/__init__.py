"""Tiny random models of the real classes of many families, each with processed batches."""

from . import beside, grids, images, mixtures, newer_grids, newer_images, others, sounds
from .common import Family

FAMILIES = (
    images.FAMILIES
    | grids.FAMILIES
    | mixtures.FAMILIES
    | others.FAMILIES
    | newer_grids.FAMILIES
    | newer_images.FAMILIES
    | beside.FAMILIES
    | sounds.FAMILIES
)

__all__ = ["FAMILIES", "Family"]
