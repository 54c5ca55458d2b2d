"""Build the box by Linux namespaces alone, where bubblewrap is not installed, and start the zygote in it.

`namespaces.py SETTINGS` with the JSON {"read_only": [...], "empty": [...], "links": {...}, "packages": {...}, "devices":
[...], "new_root": path, "command": [...]}: what [`~trl_prime.sandbox.boxes`] gives to bubblewrap as options.
"""

import json
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from isolation import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    map_user,
    mount,
    pivot_root,
    unshare,
)


def _bind(source: str, root: str, target: str | None = None, read_only: bool = True) -> None:
    target = root + (target or source)
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "a"):
            pass
    # With what is mounted below: a container binds drivers there, and cannot show a folder without them
    mount(source, target, None, MS_BIND | MS_REC)
    if read_only:
        for point in _mount_points(target):
            # A remount must keep the flags that the mount came with
            kept = os.statvfs(point).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
            mount("none", point, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | kept)


def _mount_points(folder: str) -> list[str]:
    """Where something is mounted, from a folder down."""
    with open("/proc/self/mountinfo", "rb") as file:
        fields = [line.split()[4] for line in file]
    points = [
        os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), point)) for point in fields
    ]
    return [point for point in dict.fromkeys(points) if point == folder or point.startswith(folder + "/")]


def enter_box(settings: dict) -> None:
    """Leave all namespaces and see only what the settings list."""
    os.umask(0o022)  # what is made here is for another user to see
    uid, gid = os.getuid(), os.getgid()
    spaces = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
    if uid != 0:
        unshare(CLONE_NEWUSER | spaces)
        map_user(uid, gid)
    else:
        unshare(spaces)
    if os.fork():  # the PID namespace begins with the child
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the end of the zygote must be the end of its socket
        _, status = os.wait()
        os._exit(os.waitstatus_to_exitcode(status) & 255)
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    root = settings["new_root"]
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1048576,mode=0755")
    for path in settings["read_only"]:
        _bind(path, root)
    for target, source in settings["packages"].items():
        _bind(source, root, target)
    for link, destination in settings["links"].items():
        os.symlink(destination, root + link)
    for path in settings["empty"]:
        mount("tmpfs", root + path, "tmpfs", MS_NOSUID | MS_NODEV | MS_RDONLY, "size=4096")
    for name in ("/proc", "/tmp", "/dev", "/dev/shm"):
        os.makedirs(root + name)
    for device in settings["devices"]:
        _bind(device, root, read_only=False)
    mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("none", root, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    pivot_root(root)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    try:
        enter_box(settings)
    except OSError as error:
        sys.exit(f"the box cannot be made: {error}")
    os.execve(settings["command"][0], settings["command"], {})
