"""Which part of a model is what, found by structure: roles, and the Linears that are binarized."""
