"""The recipe: from a dense model to a packed one."""
