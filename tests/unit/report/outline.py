# SPDX-License-Identifier: Apache-2.0
"""Reads a page as a browser would: nesting, headings, ids, and what could make a request."""

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Outline(HTMLParser):
    """Checks nesting, and collects headings, ids and the elements that could make a request."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.headings, self.ids, self.requests, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if "id" in values:
            self.ids.append(values["id"])
        for name in ("src", "href", "srcset", "poster", "action", "style"):
            if name in values and not values[name].startswith(("#", "data:,")):
                self.requests.append((tag, name, values[name]))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def outline(page):
    """Return what a page holds; fail where its elements are not nested."""
    found = Outline()
    found.feed(page)
    found.close()
    assert found.open == []
    return found
