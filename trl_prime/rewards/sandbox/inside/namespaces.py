"""Build the box by Linux namespaces alone, where bubblewrap is not installed, and start the zygote in it.

`namespaces.py SETTINGS` with the JSON {"read_only": [...], "empty": [...], "links": {...}, "packages": {...}, "new_root":
path, "command": [...]}: what [`~trl_prime.rewards.sandbox.boxes`] gives to bubblewrap as options.
"""

import json
import os
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

_DEVICES = ("null", "zero", "full", "random", "urandom")


def _bind(source: str, root: str, target: str | None = None, read_only: bool = True) -> None:
    target = root + (target or source)
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "a"):
            pass
    mount(source, target, None, MS_BIND)
    if read_only:
        # A remount must keep the flags that the mount came with
        kept = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
        mount("none", target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | kept)


def enter_box(settings: dict) -> None:
    """Leave all namespaces and see only what the settings list."""
    uid, gid = os.getuid(), os.getgid()
    spaces = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
    if uid != 0:
        unshare(CLONE_NEWUSER | spaces)
        map_user(uid, gid)
    else:
        unshare(spaces)
    if os.fork():  # the PID namespace begins with the child
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
    for device in _DEVICES:
        _bind(f"/dev/{device}", root, read_only=False)
    mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("none", root, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    pivot_root(root)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    enter_box(settings)
    os.execve(settings["command"][0], settings["command"], {})
