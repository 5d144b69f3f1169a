"""Lists of modules as compressed-tensors' configs have them."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.quant.embedding_names import is_embedding
from octavo.quant.formats.patterns import Regexes

CLASSES = frozenset(("Linear", "Embedding"))


class Targets:
    """A list of `targets` or `ignore`: modules by their full names, by 're:' and a regex, or all of a class."""

    def __init__(self, patterns: Sequence[str], key: str) -> None:
        """Raises FormatError, which names `key`, for a regex that is none."""
        regexes = [pattern.removeprefix("re:") for pattern in patterns if pattern.startswith("re:")]
        self.patterns = tuple(patterns)
        self.names = frozenset(patterns) - CLASSES
        self.regexes = Regexes(regexes, key)
        self._classes = CLASSES.intersection(patterns)

    def match(self, module: str) -> bool:
        """Whether any entry means this module."""
        return self.has_class_of(module) or module in self.names or self.regexes.match(module)

    def has_class_of(self, module: str) -> bool:
        """Whether all of this module's class are meant: Embedding by its name, Linear any other."""
        return ("Embedding" if is_embedding(module) else "Linear") in self._classes
