"""Implementations of `sab::linear` by device; the PyTorch one in `ops.py` specifies them."""
