"""Two replicas of octavo under Ray Serve's own routing, for benchmarks/fronts.py: `python -m benchmarks.ray_replicas`.

Arguments: a directory, in which the file `replicas` tells how many are running, a model, and flags of `octavo serve`.
Ends when its stdin does.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path

import ray
from ray import serve

from octavo.server.ray_serve import build

POLL_SECONDS = 0.2
PATIENCE = "300"  # seconds: a loaded machine takes longer to start processes than Ray waits by default
WAITS = (
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S",
    "RAY_worker_register_timeout_seconds",
)


def arguments_of(model: str, flags: list[str]) -> dict[str, str]:
    """As `serve run` takes them: `--num-threads 1` is num_threads=1."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    named = {flag.removeprefix("--").replace("-", "_"): value for flag, value in pairs}
    return {"model": model, "min_replicas": "2", "max_replicas": "2", **named}


def tell(directory: Path, stop: threading.Event) -> None:
    """Write again and again how many replicas run."""
    while not stop.wait(POLL_SECONDS):
        cell = serve.status().applications["default"].deployments.get("cell")
        number = cell.replica_states.get("RUNNING", 0) if cell else 0
        (directory / "new").write_text(str(number))
        (directory / "new").replace(directory / "replicas")


def main() -> None:
    directory, model, *flags = sys.argv[1:]
    os.environ.update(dict.fromkeys(WAITS, PATIENCE))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(arguments_of(model, flags)), name="default")
    stop = threading.Event()
    teller = threading.Thread(target=tell, args=(Path(directory), stop))
    teller.start()
    print(f"Ray serves on http://127.0.0.1:{port}", flush=True)
    sys.stdin.read()
    stop.set()
    teller.join()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
