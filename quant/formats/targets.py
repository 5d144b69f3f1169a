"""Lists of layers as compressed-tensors' configs have them."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.quant.formats.patterns import Regexes


class Targets:
    """A list of `targets` or `ignore`: layers by their full names, by 're:' and a regex, or all by the class Linear."""

    def __init__(self, patterns: Sequence[str], key: str) -> None:
        """Raises FormatError, which names `key`, for a regex that is none."""
        regexes = [pattern.removeprefix("re:") for pattern in patterns if pattern.startswith("re:")]
        self.patterns = tuple(patterns)
        self.has_class = "Linear" in patterns
        self.names = frozenset(patterns) - {"Linear"}
        self.regexes = Regexes(regexes, key)

    def match(self, module: str) -> bool:
        """Whether any entry means this linear layer."""
        return self.has_class or module in self.names or self.regexes.match(module)
