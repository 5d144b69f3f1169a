"""A process in an environment of its own that answers questions, both lines of JSON: how other libraries are asked."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def answering(command: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[Callable[[Any], Any]]:
    """Once it has said that it is ready, what asks it. Raises SystemExit with the end of its log where it ends."""
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | environment,
            text=True,
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        questions, answers = child.stdin, child.stdout

        def line() -> str:
            if not (found := answers.readline()):
                raise SystemExit(f"{' '.join(command)} ended: {log.read_text()[-2000:]}")
            return found

        def ask(question: Any) -> Any:
            questions.write(json.dumps(question) + "\n")
            questions.flush()
            return json.loads(line())

        line()  # it is ready
        yield ask
