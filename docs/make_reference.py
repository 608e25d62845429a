# SPDX-License-Identifier: Apache-2.0
"""Write `reference/methods.md` from the catalogue and the methods' docstrings: `python docs/make_reference.py`."""

from __future__ import annotations

import importlib
from pathlib import Path

from keelwright.core.catalogue import catalogue

PAGE = Path(__file__).parent / "reference" / "methods.md"


def reference_page() -> str:
    """Return the page: a table of all methods, then each docstring as it stands."""
    head = [
        "# Methods",
        "",
        "Made from the catalogue and the docstrings; `keelwright methods` prints the same table.",
        "",
        "| name | room | status | needs | source |",
        "|---|---|---|---|---|",
    ]
    parts = []
    for line in catalogue().values():
        head.append(f"| {line.name} | {line.room} | {line.status} | {', '.join(line.needs)} | {line.source} |")
        text = importlib.import_module(line.load().__module__).__doc__ or ""
        parts += ["", f"## {line.name}", "", "```text", text.strip(), "```"]
    return "\n".join([*head, *parts]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(reference_page(), encoding="utf-8")
