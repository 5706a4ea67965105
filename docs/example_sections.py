"""A griffe extension: `Example:` in a docstring is shown as code, as `Examples:` is."""

from __future__ import annotations

import griffe


class ExampleSections(griffe.Extension):
    """Renames the section before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called for every object that is loaded."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
