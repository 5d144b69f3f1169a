"""The image as a machine without a Docker daemon builds it, and as Kubernetes runs it: read-only and without rights.

`make test-image`: as root, with Debian's `buildah` and `debootstrap`. The base is a Debian of this machine's release
with this interpreter, since no registry of images may be in reach. Wheels are those that pip finds as it is set up
here; the test wants torch's without CUDA (docs/deploy.md). It took ten minutes on two busy cores, and takes 8 GB of
disk until its end.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from debian import tool
from octavo_server import SMALL, TINY, Server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NAME = "octavo:built-by-a-test"
USER = 10001
MOST_BYTES = 2e9
LIMITS = ("--isolation", "chroot", "--ulimit", "nofile=20000:20000", "--ulimit", "nproc=90000:90000")
NOT_COPIED = shutil.ignore_patterns("site-packages", "test", "__pycache__", "config-*", "idlelib", "*tkinter*")
# As the chart's securityContext and volumes have it: only /cache and /tmp can be written.
RUN = """
set -eu
root=$1 cache=$2 model=$3; shift 3
mkdir -p "$root/models"
mount --bind "$root" "$root"
mount --bind "$cache" "$root/cache"
mount --bind "$model" "$root/models"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/tmp"
mount -o remount,bind,ro "$root"
mount -o remount,bind,ro "$root/models"
exec chroot "$root" setpriv --reuid "$USER" --regid "$USER" --clear-groups --inh-caps=-all --bounding-set=-all \
    --no-new-privs -- "$@"
"""


@dataclass(frozen=True)
class Image:
    """A built image: its files, and what it says of itself."""

    root: Path
    config: dict[str, Any]


def run(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout}"
    return done.stdout.strip()


def libraries_of(prefix: Path) -> set[str]:
    """Debian's packages of the libraries that this interpreter is linked with, by its modules too."""
    modules = [path for path in prefix.glob("lib/python3.*/lib-dynload/*.so") if not path.name.startswith("_tkinter")]
    files = [Path(sys.executable).resolve(), *modules]
    said = subprocess.run(["ldd", *files], capture_output=True, text=True, check=True).stdout
    paths = {Path(path).resolve() for path in re.findall(r"=> (/\S+)", said)}
    owners = run("dpkg", "--search", *sorted(path for path in paths if not path.is_relative_to(prefix)))
    return {line.split(":")[0] for line in owners.splitlines()}


def make_base(root: Path) -> None:
    """A Debian with this interpreter as `python3`."""
    prefix = Path(sys.base_prefix)
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    packages = ",".join(sorted(libraries_of(prefix)))
    run(tool("debootstrap", "debootstrap"), "--variant=minbase", f"--include={packages}", release, root)
    version = f"python3.{sys.version_info.minor}"
    shutil.copytree(prefix / "lib" / version, root / prefix.relative_to("/") / "lib" / version, ignore=NOT_COPIED)
    for path in [prefix / "bin" / version, *prefix.glob("lib/libpython3*")]:
        target = root / path.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target, follow_symlinks=False)
    for parent in (root / prefix.relative_to("/")).parents:  # it may lie in somebody's home
        if parent.is_relative_to(root):
            parent.chmod(0o755)
    (root / "usr/local/bin/python3").symlink_to(prefix / "bin" / version)
    for name in ("var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(root / name)


def fetch_wheels(directory: Path) -> None:
    """All that octavo is installed from, so that the build itself asks no index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", directory, *wanted)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    if os.geteuid() != 0:
        pytest.fail("building and running an image without a daemon takes root")
    directory = tmp_path_factory.mktemp("image")
    storage = ("--storage-driver", "vfs", "--root", str(directory / "storage"), "--runroot", str(directory / "run"))
    buildah = (tool("buildah", "buildah"), *storage)
    base = directory / "base"
    wheels = directory / "wheels"
    try:
        make_base(base)
        fetch_wheels(wheels)
        container = run(*buildah, "from", "scratch")
        run(*buildah, "add", "--quiet", container, base, "/")
        run(*buildah, "commit", "--quiet", "--rm", container, "base")
        shutil.rmtree(base)
        arguments = ("--build-arg", "BASE=localhost/base", "--build-arg", "PIP_OPTIONS=--no-index --find-links /wheels")
        files = ("--ignorefile", "deploy/docker/Dockerfile.dockerignore", "--file", "deploy/docker/Dockerfile")
        mounts = ("--volume", f"{wheels}:/wheels:ro")
        build = ("build", *LIMITS, "--pull=never", *arguments, *mounts, *files, "--tag", NAME, ".")
        run("env", "--chdir", ROOT, *buildah, *build)
        described = json.loads(run(*buildah, "inspect", "--type", "image", NAME))
        mounted = run(*buildah, "mount", run(*buildah, "from", "--pull=never", NAME))
        yield Image(Path(mounted), described["OCIv1"]["config"])
    finally:
        run("rm", "--recursive", "--force", "--one-file-system", directory)


def running(image: Image, cache: Path, *arguments: str) -> subprocess.Popen[str]:
    """Its entry point, with these arguments."""
    variables: Sequence[str] = image.config["Env"]
    command = ["env", "--ignore-environment", f"--chdir={image.config['WorkingDir']}", *variables]
    command += [*image.config["Entrypoint"], *arguments]
    in_chroot = ["unshare", "--mount", "--pid", "--fork", "sh", "-c", RUN, "sh"]
    return subprocess.Popen(
        [*in_chroot, image.root, cache, TINY, *command],
        env=os.environ | {"USER": str(USER)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def size_of(root: Path) -> int:
    return int(run("du", "--summarize", "--bytes", root).split()[0])


def descendants(process: int) -> list[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it has ended
        return []
    return [it for child in map(int, children) for it in (child, *descendants(child))]


def status_of(process: int) -> dict[str, str]:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_the_image_answers_as_a_user_without_rights(image: Image, tmp_path: Path) -> None:
    assert image.config["User"] == f"{USER}:{USER}"
    assert size_of(image.root) <= MOST_BYTES
    cache = tmp_path / "cache"
    cache.mkdir()
    os.chown(cache, USER, USER)
    tmp_path.chmod(0o755)
    with running(image, cache, "/models", "--served-model-name", "tiny", "--port", "0", *SMALL) as process:
        try:
            server = Server(process)
            server.wait_until_ready()
            with server.client() as client:
                body = {"model": "tiny", "prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
                answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 8
            statuses = [status_of(it) for it in descendants(process.pid)]
            assert len(statuses) >= 2, "the server and its engine"
            for status in statuses:
                assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(USER)}
                assert int(status["CapBnd"], 16) == int(status["CapEff"], 16) == 0
                assert status["NoNewPrivs"] == "1"
            os.kill(descendants(process.pid)[0], signal.SIGTERM)  # as a pod is ended; it is process 1 there
            assert server.exit_code() == 0
        finally:
            for it in descendants(process.pid):
                os.kill(it, signal.SIGKILL)
    # What it had to write it wrote to its volume.
    assert [path for path in cache.rglob("*") if path.is_file()]
