"""Makes a virtual environment with torch in it, without fetching a CUDA build for nothing.

Usage: python3 .ci/make_venv.py FOLDER

The first of these that applies decides where torch comes from:
1. ZO_KERNELS_TORCH: a wheel or requirement for pip;
2. the running Python has a torch that is new enough and is no virtual environment itself, whose
   packages another one cannot see: the environment sees it (--system-site-packages);
3. an NVIDIA GPU is visible: the default build of the package index;
4. pip is configured with local wheels (find-links) and one of them is torch: that one;
5. the CPU build of the PyTorch project's own index.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

LEAST = (2, 6)
REQUIREMENT = "torch>=" + ".".join(map(str, LEAST))
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def run(*command: str) -> bool:
    """Whether the command succeeded."""
    print("+", *command, flush=True)
    return subprocess.run(command).returncode == 0


def has_torch() -> bool:
    """Whether the running Python has a torch that is new enough."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is not None and tuple(map(int, numbers.groups())) >= LEAST:
        return True
    print(f"the installed torch is {version}, not {REQUIREMENT}; looking for another")
    return False


def main() -> int:
    """Make the environment; the exit status."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    chosen = os.environ.get("ZO_KERNELS_TORCH")
    plain = sys.prefix == sys.base_prefix
    existing = chosen is None and plain and has_torch()
    venv.create(folder, with_pip=True, clear=True, system_site_packages=existing)
    pip = (str(folder / "bin" / "python"), "-m", "pip")
    if existing:
        return 0
    install = (*pip, "install", "--quiet")
    if chosen:
        return 0 if run(*install, chosen) else 1
    if shutil.which("nvidia-smi"):
        return 0 if run(*install, REQUIREMENT) else 1
    local = folder / "wheels"
    if run(*pip, "download", "--quiet", "--no-index", "--no-deps", "-d", str(local), REQUIREMENT):
        wheel = next(local.glob("torch-*.whl"))
        done = run(*install, str(wheel))
        shutil.rmtree(local)
        return 0 if done else 1
    print("no local torch wheel; trying the CPU build of the PyTorch index")
    if run(*install, "--index-url", CPU_INDEX, REQUIREMENT):
        return 0
    print("could not install torch; name a wheel: ZO_KERNELS_TORCH=FILE make ...", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
