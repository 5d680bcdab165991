"""The library as a wheel carries it: what it needs of the system, and the platform tag that says so."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from packaging.tags import platform_tags

from trilobit.kernels import build

LISTING = """
Dynamic Section:
  NEEDED               libm.so.6
  NEEDED               libc.so.6
  SONAME               libgomp.so.1

Version References:
  required from libm.so.6:
    0x06969189 0x00 13 GLIBC_2.29
  required from libc.so.6:
    0x06969194 0x00 10 GLIBC_2.4
    0x09691972 0x00 03 GLIBC_2.3.2
"""


def test_the_tag_is_that_of_the_latest_symbol() -> None:
    """Versions are compared as numbers, across libraries, and none is older than any manylinux tag."""
    assert build.needed_glibc(LISTING) == (2, 29)
    assert build.needed_glibc(LISTING.replace("2.29", "2.5")) == (2, 17)
    assert build.needed_glibc(LISTING.replace("2.3.2", "2.34.1")) == (2, 34)


@pytest.mark.parametrize("other", ["libstdc++.so.6", "libgcc_s.so.1", "libc.musl-x86_64.so.1", "libgomp.so.1"])
def test_what_needs_more_than_glibc_has_no_manylinux_tag(other: str) -> None:
    """Another library among those needed, or none known to be needed, gives no version."""
    assert build.needed_glibc(LISTING.replace("NEEDED               libc.so.6", f"NEEDED               {other}")) is None
    assert build.needed_glibc("") is None


needs_linux = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("objdump") is None or build.compiler() is None,
    reason="no Linux, or no objdump or compiler",
)


@needs_linux
def test_the_library_needs_glibc_alone() -> None:
    """Its tag is manylinux, of the latest version that the file names, and pip takes it on the machine that built it."""
    library = build.build()
    tag = build.wheel_platform(library, "linux")
    named = {(int(a), int(b)) for a, b in re.findall(rb"GLIBC_(\d+)\.(\d+)", library.read_bytes())}
    major, minor = max(named | {build.LEAST_GLIBC})
    assert tag == f"manylinux_{major}_{minor}_{build.machine()}"
    assert tag in platform_tags()


@needs_linux
def test_a_library_that_needs_more_keeps_the_default(tmp_path: Path) -> None:
    """One that calls C++'s own library is not called manylinux."""
    source, library = tmp_path / "a.cpp", tmp_path / "a.so"
    source.write_text("int *f() { return new int[3]; }")
    driver = build.compiler()
    assert driver is not None
    build._run([driver, "-shared", "-fPIC", str(source), "-o", str(library)])
    assert build.wheel_platform(library, "linux_x86_64") == "linux_x86_64"
