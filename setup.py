"""Builds the C++ extension `zo_kernels._C` with ninja.

One object file per instruction set, each with its own flags; the choice is made when the module
is used (csrc/dispatch.cpp), so one build runs on every processor of the architecture. torch is
not needed to build. `ZO_KERNELS_SKIP_CPP=1` installs without the extension, which is for Linux
only: CPU tensors then use the slow reference backend.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def compiler() -> list[str]:
    """The command of the C++ compiler, which may begin with a launcher (CXX="ccache g++").

    Raises:
        SystemExit: there is none.
    """
    chosen = os.environ.get("CXX")
    found = shutil.which("c++") or shutil.which("g++")
    if chosen:
        return shlex.split(chosen)
    if found is None:
        raise SystemExit(
            "zo_kernels: no C++ compiler found (looked at CXX, c++, g++).\n"
            "Install one (Debian: apt-get install g++), or set ZO_KERNELS_SKIP_CPP=1 to "
            "install without the CPU kernels."
        )
    return [found]


def is_gcc(command: list[str]) -> bool:
    """Whether the compiler is GCC (clang calls itself so on some systems, but not here).

    Raises:
        SystemExit: it cannot be run.
    """
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, text=True)
    except OSError as error:
        got = shlex.join(command)
        raise SystemExit(f"CXX: expected a compiler, got {got!r}: {error}") from None
    return "Free Software Foundation" in version.stdout


CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    # The noise contract: every mul, add and fma exactly as written (csrc/noise.h).
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
]
GCC_FLAGS = [
    # 8 % on AVX2, whose 16 registers the two interleaved Philox blocks fill.
    "-fschedule-insns",
    "-fsched-pressure",
    # GCC 12 warns about its own _mm512_undefined_*() (GCC bug 105593).
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
ISA_FLAGS = {
    "x86_64": {
        "scalar": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
        "avx512bf16": [
            *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"),
            "-DZO_BF16_HARDWARE",
        ],
    },
    "aarch64": {"scalar": [], "neon": []},
}
PLAIN_SOURCES = ["dispatch.cpp", "exceptions.cpp", "parallel.cpp", "bindings.cpp"]


def isa_defines(isa: str) -> list[str]:
    """The macros csrc/isa.cpp reads."""
    return [f"-DZO_ISA={isa}", f"-DZO_ISA_{isa.upper()}"]


def ninja_escape(path: object) -> str:
    """A path as ninja wants it in a build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuildExt(build_ext):
    """Compiles the extension with ninja: parallel, incremental, header dependencies tracked."""

    def build_extension(self, ext: Extension) -> None:
        """Write build.ninja into the temporary folder and run it."""
        if platform.system() != "Linux":
            raise SystemExit(
                f"zo_kernels: the CPU kernels are for Linux, and this is {platform.system()}; set "
                "ZO_KERNELS_SKIP_CPP=1 to install without them."
            )
        import ninja
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        command = compiler()
        always = [*CXX_FLAGS, *(GCC_FLAGS if is_gcc(command) else [])]
        always += shlex.split(os.environ.get("CXXFLAGS", ""))
        includes = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
        lines = [
            f"cxx = {shlex.join(command).replace('$', '$$')}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx -shared -fopenmp $in -o $out",
        ]
        objects = []

        def compile_rule(source: str, object_name: str, flags: list[str]) -> None:
            target = build / object_name
            objects.append(ninja_escape(target))
            source_path = ninja_escape(ROOT / "csrc" / source)
            lines.append(f"build {objects[-1]}: compile {source_path}")
            lines.append(f"  flags = {shlex.join([*always, *flags]).replace('$', '$$')}")

        for isa, flags in ISA_FLAGS.get(platform.machine(), {"scalar": []}).items():
            compile_rule("isa.cpp", f"isa_{isa}.o", [*flags, *isa_defines(isa)])
        for source in PLAIN_SOURCES:
            compile_rule(source, Path(source).stem + ".o", includes)
        lines.append(f"build {ninja_escape(output)}: link {' '.join(objects)}")
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        run = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)]
        if subprocess.run(run).returncode != 0:
            raise SystemExit(
                "zo_kernels: compiling the CPU kernels failed (see the compiler's message above).\n"
                "They need a C++17 compiler (g++ 10 or clang 12 and newer) with OpenMP; or set "
                "ZO_KERNELS_SKIP_CPP=1 to install without them."
            )


skip = os.environ.get("ZO_KERNELS_SKIP_CPP") == "1"
if skip:
    print("zo_kernels: ZO_KERNELS_SKIP_CPP=1, no CPU kernels are built", file=sys.stderr)
setup(
    ext_modules=[] if skip else [Extension("zo_kernels._C", sources=[])],
    cmdclass={"build_ext": NinjaBuildExt},
)
