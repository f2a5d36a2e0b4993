"""Tiny random models of the real classes of many families, each with processed batches."""

from . import grids, images, mixtures, newest, others
from .common import Family

FAMILIES = images.FAMILIES | grids.FAMILIES | mixtures.FAMILIES | others.FAMILIES | newest.FAMILIES

__all__ = ["FAMILIES", "Family"]
