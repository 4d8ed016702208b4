"""The shared libraries that MediaPipe, and the OpenCV it brings, load: checked before anything is installed.

Run as root on Debian or Ubuntu, it installs what is missing; otherwise it stops with the line to type.
Standard library only: this runs before the environment exists.
"""

import ctypes
import os
import shutil
import subprocess
import sys

LIBRARIES = {
    "libGL.so.1": "libgl1",
    "libEGL.so.1": "libegl1",
    "libGLESv2.so.2": "libgles2",
    "libglib-2.0.so.0": "libglib2.0-0",
    "libxcb.so.1": "libgl1",
}


def missing() -> list[str]:
    """Debian packages of the libraries that do not load."""
    absent = []
    for library, package in LIBRARIES.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            absent.append(package)
    return sorted(set(absent))


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs on whatever Python there is
        print(
            f"Python 3.11 or later is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 ...",
            file=sys.stderr,
        )
        return 1
    if not sys.platform.startswith("linux"):
        return 0  # elsewhere the wheels bring what they need
    packages = missing()
    if not packages:
        return 0
    line = f"apt-get install -y --no-install-recommends {' '.join(packages)}"
    if os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"installing system libraries for MediaPipe: {' '.join(packages)}", flush=True)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-q"], env=environment, check=False)
        subprocess.run(line.split(), env=environment, check=False)
        packages = missing()
        if not packages:
            return 0
    print(
        "MediaPipe needs system libraries that are not here. Type this, then run make again:\n\n"
        f"    sudo {line}\n",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
