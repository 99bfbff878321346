"""Docstrings' roles (``:func:`name```) as links and code, which Markdown has."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|mod|data|meth|attr):`~?([^`]+)`")


class Roles(griffe.Extension):
    """A full name of something that has a page becomes a link, any other name code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(_shown, obj.docstring.value)


def _shown(role: re.Match[str]) -> str:
    return f"`{role.group(1)}`"
