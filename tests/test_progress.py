"""Where progress bars are shown: terminals, notebooks, nowhere else."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from introvae.progress import in_notebook, progress_bar

CODE = "from introvae.progress import progress_bar\nfor _ in progress_bar(range(3), 'counting', mininterval=0): pass"


def said(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stderr


def fake_notebook(widgets: bool) -> str:
    """Code after which a process looks like a notebook's kernel, with or without ipywidgets."""
    return f"""
import sys, types
class ZMQInteractiveShell: pass
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=ZMQInteractiveShell)
sys.modules["ipywidgets"] = {"types.ModuleType('ipywidgets')" if widgets else "None"}
made = []
notebook = types.ModuleType("tqdm.notebook")
notebook.tqdm = lambda *words, **settings: made.append(settings) or iter(words[0])
sys.modules["tqdm.notebook"] = notebook
"""


def test_a_pipe_has_none() -> None:
    assert said(CODE) == ""


def test_a_notebook_without_widgets_has_a_line_of_text() -> None:
    assert "counting" in said(fake_notebook(widgets=False) + CODE)


def test_a_notebook_with_widgets_has_one() -> None:
    code = fake_notebook(widgets=True) + CODE
    assert said(code + "\nassert made and made[0]['disable'] is False, made") == ""


def test_none_is_shown_where_none_is_wanted() -> None:
    code = fake_notebook(widgets=False) + CODE.replace("mininterval=0", "mininterval=0, shown=False")
    assert said(code) == ""


def test_other_shells_are_no_notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    assert not in_notebook()
    assert list(progress_bar([1, 2], shown=False)) == [1, 2]
