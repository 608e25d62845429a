# SPDX-License-Identifier: Apache-2.0
"""Inline SVG: an escaping element builder, and the marks that the figures share.

Colours never appear here; every shape has a class, and the style sheet paints it for both themes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

SHAPES = ("circle", "square", "triangle", "diamond", "hexagon", "down", "cross", "star", "right", "left", "saltire")
"""One per method, in the order in which methods appear."""


def element(tag: str, *children: str | Markup, **attributes: str | float | None) -> Markup:
    """Return one SVG element; text children and attribute values are escaped.

    Args:
        tag: Element name.
        children: Markup is taken as it is, plain text is escaped.
        attributes: None leaves the attribute out; a trailing underscore is dropped and inner ones become dashes.
    """
    pairs = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _coordinate(value))
        for key, value in attributes.items()
        if value is not None
    ]
    opening = Markup("<{}{}").format(Markup(tag), Markup("").join(pairs))
    if not children:
        return opening + Markup("/>")
    return opening + Markup(">") + Markup("").join(escape(child) for child in children) + Markup(f"</{tag}>")


def group(children: Sequence[Markup], **attributes: str | float | None) -> Markup:
    """Return a `g` element."""
    return element("g", Markup("").join(children), **attributes)


def picture(name: str, title: str, description: str, width: float, height: float, body: Sequence[Markup]) -> Markup:
    """Return a whole `svg` element with an accessible name and description.

    Args:
        name: Unique id on the page; prefixes the ids of title and description.
        title: Accessible name.
        description: What a reader who cannot see the figure needs to know.
        width: Width of the view box, in user units.
        height: Height of the view box.
        body: What is drawn.
    """
    return element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("desc", description, id=f"{name}-desc"),
        *body,
        id=name,
        role="img",
        viewBox=f"0 0 {_coordinate(width)} {_coordinate(height)}",
        width=width,
        height=height,
        aria_labelledby=f"{name}-title",
        aria_describedby=f"{name}-desc",
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def label(x: float, y: float, text: str, class_: str, anchor: str = "start") -> Markup:
    """Return a line of text; `anchor` is start, middle or end."""
    return element("text", text, x=x, y=y, class_=class_, text_anchor=None if anchor == "start" else anchor)


def marker(shape: str, x: float, y: float, radius: float, class_: str) -> Markup:
    """Return a small mark of one of `SHAPES` centred at (x, y), of about equal area for every shape."""
    if shape == "circle":
        return element("circle", cx=x, cy=y, r=radius, class_=class_)
    if shape in _RAYS:
        return element("polygon", points=_rays(shape, x, y, radius), class_=class_)
    if shape in _TURNS:
        turned = [(x + 1.35 * radius * dx, y + 1.35 * radius * dy) for dx, dy in _TURNS[shape]]
        points_ = " ".join(f"{_coordinate(one)},{_coordinate(two)}" for one, two in turned)
        return element("polygon", points=points_, class_=class_)
    corners, turn, scale = {
        "square": (4, 0.25, 1.2),
        "triangle": (3, 0.0, 1.35),
        "diamond": (4, 0.0, 1.3),
        "hexagon": (6, 0.0, 1.1),
        "down": (3, 0.5, 1.35),
    }[shape]
    points = []
    for corner in range(corners):
        angle = 2 * math.pi * ((corner + turn * (2 if corners == 4 else 1)) / corners) - math.pi / 2
        points.append(
            f"{_coordinate(x + scale * radius * math.cos(angle))},{_coordinate(y + scale * radius * math.sin(angle))}"
        )
    return element("polygon", points=" ".join(points), class_=class_)


_TURNS = {"right": ((1.0, 0.0), (-0.5, -0.866), (-0.5, 0.866)), "left": ((-1.0, 0.0), (0.5, -0.866), (0.5, 0.866))}
_RAYS = {"star": (5, 0.0), "cross": (4, 0.0), "saltire": (4, 0.5)}
"""Number of points, and by how much of the step between two they are turned."""


def _rays(shape: str, x: float, y: float, radius: float) -> str:
    """Return the outline of a star, or of a cross with arms as wide as the mark's lines can show."""
    rays, turn = _RAYS[shape]
    outline = []
    for ray in range(rays):
        middle = 2 * math.pi * (ray + turn) / rays - math.pi / 2
        # A star's ray ends in a point, a cross's arm in an edge.
        tips = ((0.0, 1.5),) if shape == "star" else ((-0.33, 1.4), (0.33, 1.4))
        outline += [(middle + angle, reach) for angle, reach in (*tips, (math.pi / rays, 0.65))]
    corners = ((x + radius * reach * math.cos(angle), y + radius * reach * math.sin(angle)) for angle, reach in outline)
    return " ".join(f"{_coordinate(one)},{_coordinate(two)}" for one, two in corners)


def role_disc(role: str, title: str, x: float, y: float, radius: float) -> Markup:
    """Return the disc of a model with its title's first letter, so that colour is never the only sign."""
    return group(
        [
            element("circle", cx=x, cy=y, r=radius),
            label(x, y + radius * 0.38, title[:1].upper(), "letter", "middle"),
        ],
        class_=f"disc role-{role}",
    )


def _coordinate(value: str | float | None) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
