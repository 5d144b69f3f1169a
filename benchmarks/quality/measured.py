"""A command to its end: `python measured.py COST.json LOG COMMAND...` writes what it took, and how it ended.

Linux counts the memory of the process that starts another one as that one's own peak, so this one imports little.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time


def main() -> None:
    """Write wall and CPU seconds, the peak of memory in MB (10^6 bytes), and a failed command's last line."""
    cost_file, log_file, *command = sys.argv[1:]
    begin = time.perf_counter()
    with open(log_file, "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        raise SystemExit(f"{' '.join(command)} was ended by signal {-code}")
    with open(log_file, encoding="utf-8", errors="replace") as log:
        lines = log.read().strip().splitlines()
    cost = {
        "wall s": round(time.perf_counter() - begin, 1),
        "CPU s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak MB": round(usage.ru_maxrss * 1024 / 1e6),
        "refusal": lines[-1] if code else "",
    }
    with open(cost_file, "w", encoding="utf-8") as file:
        json.dump(cost, file)


if __name__ == "__main__":
    main()
