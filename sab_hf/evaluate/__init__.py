"""How good a model is: questions with known answers, scorers, public tasks, and a comparison with the original."""

import sys
from types import ModuleType
from typing import Any

from .compare import evaluate
from .tasks import evaluate_tasks

__all__ = ["evaluate", "evaluate_tasks"]


class _Callable(ModuleType):
    """A room with the name of its function: `sab_hf.evaluate(…)` is `sab_hf.evaluate.evaluate(…)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
