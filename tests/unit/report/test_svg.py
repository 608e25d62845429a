# SPDX-License-Identifier: Apache-2.0
import xml.etree.ElementTree as tree

import pytest
from markupsafe import Markup

from keelwright.report.svg import SHAPES, element, label, marker, picture, role_disc


def test_text_and_attributes_are_escaped():
    drawn = element("text", "<script>", fill='"><script>')
    assert "<script>" not in drawn
    assert "&lt;script&gt;" in drawn


def test_markup_children_are_taken_as_they_are():
    assert element("g", element("line", x1=0)) == Markup('<g><line x1="0"/></g>')


def test_underscores_become_dashes_and_none_is_left_out():
    assert element("path", class_="a", aria_hidden="true", d=None) == '<path class="a" aria-hidden="true"/>'


def test_coordinates_are_rounded():
    assert label(1.23456, 2.0, "x", "c") == '<text x="1.2" y="2" class="c">x</text>'


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_centred_on_its_point(shape):
    drawn = tree.fromstring(marker(shape, 50, 50, 5, "m"))
    if shape == "circle":
        assert (drawn.get("cx"), drawn.get("cy")) == ("50", "50")
        return
    points = [tuple(map(float, pair.split(","))) for pair in drawn.get("points").split()]
    assert sum(x for x, _ in points) / len(points) == pytest.approx(50, abs=0.1)
    assert sum(y for _, y in points) / len(points) == pytest.approx(50, abs=0.1)


def test_shapes_differ():
    assert len({marker(shape, 0, 0, 5, "m") for shape in SHAPES}) == len(SHAPES)


def test_a_disc_shows_the_first_letter_of_its_model():
    assert ">C</text>" in role_disc("repaired", "Candidate", 0, 0, 8)


def test_a_picture_has_an_accessible_name_and_description():
    drawn = tree.fromstring(picture("p", "a <name>", "what it shows", 10, 20, []))
    assert drawn.get("role") == "img"
    assert drawn.get("aria-labelledby") == "p-title"
    assert [child.text for child in drawn] == ["a <name>", "what it shows"]
    assert drawn.get("viewBox") == "0 0 10 20"
