"""Extension of griffe, which reads the docstrings and knows "Examples" sections; ours say "Example"."""

import re

import griffe

__all__ = ["ExampleSections"]


class ExampleSections(griffe.Extension):
    """Let `Example:` mean `Examples:`, so that it is rendered as code."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
