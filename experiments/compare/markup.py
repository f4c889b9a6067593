"""Elements of HTML and SVG. What they hold is escaped when they are written."""

from __future__ import annotations

from xml.etree.ElementTree import Element, tostring


def element(tag: str, *content: Element | str, **attributes: str | float) -> Element:
    """Return an element.

    Args:
        tag: its name.
        content: elements and text, in their order.
        attributes: by name; a `_` in the name stands for `-`, and one at its end for nothing (`class_`).
    """
    named = {name.rstrip("_").replace("_", "-"): str(value) for name, value in attributes.items()}
    made = Element(tag, named)
    for part in content:
        if isinstance(part, Element):
            made.append(part)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + part
        else:
            made.text = (made.text or "") + part
    return made


def html_of(page: Element) -> str:
    """Return a whole page as text."""
    return f"<!DOCTYPE html>\n{tostring(page, 'unicode', method='html')}\n"
