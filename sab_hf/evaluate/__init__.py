"""How good a model is: questions with known answers, scorers, public tasks, and a comparison with the original."""

from .compare import evaluate
from .tasks import evaluate_tasks

__all__ = ["evaluate", "evaluate_tasks"]
