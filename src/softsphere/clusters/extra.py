"""The packages that the library does without, except here."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["needed", "one_thread"]


def needed(module: str) -> Any:
    """Returns a module of scikit-learn or SciPy, which are imported only when they are used.

    Raises ImportError with the command that installs them.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"clusters by vectors and by neighbours need scikit-learn and SciPy ({error}); "
            "install them with: pip install scikit-learn scipy"
        ) from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets scikit-learn use one thread, since sums of several threads differ from run to run."""
    with needed("threadpoolctl").threadpool_limits(limits=1):
        yield
