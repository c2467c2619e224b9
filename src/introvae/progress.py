"""Progress bars: in terminals and in notebooks, and nowhere else."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def progress_bar(*words: Any, shown: bool = True, **settings: Any) -> Any:
    """tqdm's bar where someone looks at it: standard error is a terminal, or a notebook runs the code.

    A notebook gets tqdm's widget where ipywidgets is installed, and its line of text where not.

    Arguments:
        words, settings: of tqdm.
        shown: False for none at all.

    Example:
        >>> sum(progress_bar(range(4), shown=False))
        6
    """
    from tqdm import tqdm

    kind: Any = tqdm
    disable = None if shown else True  # None: where standard error is no terminal
    if shown and in_notebook():
        disable = False
        try:
            import_module("ipywidgets")
            kind = import_module("tqdm.notebook").tqdm
        except ImportError:
            pass
    return kind(*words, disable=disable, **settings)


def in_notebook() -> bool:
    """Whether a notebook's kernel runs this code.

    Example:
        >>> in_notebook()
        False
    """
    shell = sys.modules.get("IPython")
    return shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"
