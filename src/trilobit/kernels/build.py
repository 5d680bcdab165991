"""Compile native/ into one shared library: `python -m trilobit.kernels.build [ARCHITECTURE COMPILER]`.

Each instruction set is a file with flags of its own, so that one library runs on every processor of an architecture and
chooses at run time; nothing about the machine that compiles goes into it. The result lies in build/native/<key>/, the key
a hash of sources and flags: an edited source is another library, never a stale one. `pip install` runs this too
(hatch_build.py), puts the library into wheels, and installs without it where there is no compiler. Imports no torch.

The sources use nothing of C++'s own library but its headers, so that of the system a wheel needs glibc alone, and its tag
says from which version on. (A static libstdc++ would bring an unwinder that asks for a later glibc than all else does.)
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from trilobit.errors import TrilobitError

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[2]
SOURCES = CHECKOUT / "native"
NAME = "libtrilobit.dylib" if sys.platform == "darwin" else "libtrilobit.so"
COMPILERS = ("g++", "clang++", "c++")

# -ffp-contract=off: a product and a sum that the definition rounds twice must not become one fused multiply-add.
COMMON = [
    "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread",
    "-ffp-contract=off", "-fno-math-errno", "-fno-exceptions", "-fno-rtti",
    "-Wall", "-Wextra", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized",
]  # fmt: skip
# Attention and the like have no such definition: there the fused form is the better one.
FLOATS = ["-ffp-contract=fast"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"]
LINK = ["-Wl,--as-needed"] if sys.platform == "linux" else []  # not libstdc++, which compilers name unasked
GLIBC = re.compile(r"(libc|libm|libpthread|libdl|ld-linux[\w-]*)\.so\.\d")
LEAST_GLIBC = (2, 17)  # of any manylinux tag in use
# Object → its source and flags. avx512.cpp is compiled twice, floats.cpp once for each width of vectors.
UNITS: dict[str, tuple[str, list[str]]] = {
    "scalar": ("scalar.cpp", []),
    "pool": ("pool.cpp", []),
    "dispatch": ("dispatch.cpp", []),
    "engine": ("engine.cpp", []),
    "sample": ("sample.cpp", []),
    "bf16": ("bf16.cpp", []),
    "floats": ("floats.cpp", FLOATS),
}
UNITS_OF_MACHINE: dict[str, dict[str, tuple[str, list[str]]]] = {
    "x86_64": {
        "avx2": ("avx2.cpp", ["-mavx2"]),
        "avxvnni": ("avxvnni.cpp", ["-mavx2", "-mavxvnni"]),
        "avx512": ("avx512.cpp", AVX512),
        "avx512vbmi": ("avx512.cpp", [*AVX512, "-mavx512vbmi"]),
        "avx512bf16": ("avx512bf16.cpp", [*AVX512, "-mavx512bf16"]),
        "floats_avx2": ("floats.cpp", [*FLOATS, "-mavx2", "-mfma"]),
        "floats_avx512": ("floats.cpp", [*FLOATS, *AVX512]),
    },
    "aarch64": {"neon": ("neon.cpp", ["-march=armv8.2-a+dotprod"])},
}


class BuildError(TrilobitError):
    """The native library cannot be compiled here. Says what is missing or what the compiler said."""


def machine() -> str:
    """The architecture, in one spelling."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def compiler() -> str | None:
    """The first C++ compiler on the path."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def units(architecture: str) -> dict[str, tuple[str, list[str]]]:
    return UNITS | UNITS_OF_MACHINE.get(architecture, {})


def target(architecture: str) -> Path:
    """Where the library of the present sources belongs."""
    digest = hashlib.sha256(repr((COMMON, LINK, architecture, units(architecture))).encode())
    sources = {SOURCES / source for source, _ in units(architecture).values()}
    for path in sorted([*sources, *SOURCES.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return CHECKOUT / "build" / "native" / digest.hexdigest()[:16] / NAME


@cache
def find_library() -> Path | None:
    """The library beside this file, or that of the checkout's present sources; None if neither has been built."""
    candidates = [HERE / NAME, *([target(machine())] if SOURCES.is_dir() else [])]
    return next((path for path in candidates if path.exists()), None)


def why_not() -> str:
    """Why find_library has nothing, and what to do, in words."""
    if not SOURCES.is_dir():
        return "it was installed where no C++ compiler was; reinstall with one"
    if compiler() is None:
        return f"no C++ compiler ({', '.join(COMPILERS)}) on the path"
    return "not built yet: run python -m trilobit.kernels.build"


def build(architecture: str | None = None, driver: str | None = None) -> Path:
    """Compile if the library of the present sources is not there yet, and return its path. Raises BuildError.

    architecture: by default this machine's, for which a compiler is found; for another one, `driver` is its compiler.
    """
    architecture, driver = architecture or machine(), driver or compiler()
    path = target(architecture)
    if path.exists():
        return path
    if driver is None:
        raise BuildError(f"no C++ compiler ({', '.join(COMPILERS)}) on the path: install one, or go on with torch alone.")
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent.parent) as temporary, ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = {name: str(Path(temporary) / f"{name}.o") for name in units(architecture)}
        commands = [
            [driver, *COMMON, *flags, "-c", str(SOURCES / source), "-o", objects[name]]
            for name, (source, flags) in units(architecture).items()
        ]
        list(threads.map(_run, commands))
        linked = Path(temporary) / NAME
        _run([driver, "-shared", "-pthread", *LINK, *objects.values(), "-o", str(linked)])
        path.parent.mkdir(exist_ok=True)
        os.replace(linked, path)
    find_library.cache_clear()
    return path


def wheel_platform(library: Path, default: str) -> str:
    """The platform tag of a wheel with this library: manylinux_X_Y, X.Y the latest glibc that it asks for, where it needs
    nothing but glibc and objdump is there to say so (PEP 600); else `default`."""
    objdump = shutil.which("objdump")
    if sys.platform != "linux" or objdump is None:
        return default
    command, environment = [objdump, "--private-headers", str(library)], {**os.environ, "LC_ALL": "C"}
    listing = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    version = needed_glibc(listing)
    return default if version is None else f"manylinux_{version[0]}_{version[1]}_{machine()}"


def needed_glibc(listing: str) -> tuple[int, int] | None:
    """The glibc version that a library needs, from what `objdump -p` says of it; None where it needs another library too."""
    needed = re.findall(r"^\s+NEEDED\s+(\S+)$", listing, re.MULTILINE)
    if not needed or not all(GLIBC.fullmatch(name) for name in needed):
        return None
    found = re.findall(r"^\s+0x[0-9a-f]+ 0x[0-9a-f]+ \d+ GLIBC_(\d+)\.(\d+)", listing, re.MULTILINE)
    return max([LEAST_GLIBC, *((int(major), int(minor)) for major, minor in found)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = "\n".join(done.stderr.splitlines()[:20])
        raise BuildError(f"{' '.join(command)} failed:\n{said}")


if __name__ == "__main__":
    try:
        print(build(*sys.argv[1:3]))
    except BuildError as error:
        sys.exit(f"error: {error}")
