"""How good a model is: questions with known answers, scorers, and a comparison with the original."""

from .compare import evaluate

__all__ = ["evaluate"]
