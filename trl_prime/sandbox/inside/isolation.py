"""Linux isolation for one process: namespaces, mounts, capabilities, system-call filter and limits.

Runs inside the sandbox on the standard library alone, by ctypes where Python has no call. Every function raises
`OSError` when a wall cannot be put up: a program never starts behind fewer walls than asked for.
"""

import _thread
import contextlib
import ctypes
import fcntl
import os
import platform
import resource
import signal
import stat
import struct
from collections.abc import Collection

_libc = ctypes.CDLL(None, use_errno=True)
_locked_libc = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock during a call

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
_ANY_NAMESPACE = 0x7E020000  # all of them; CLONE_NEWTIME is none of clone's, whose low byte is the exit signal

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
OPEN_FILES = 64

_CLONE_CHILD_CLEARTID, _CLONE_CHILD_SETTID = 0x00200000, 0x01000000
_TID_OFFSETS = {"x86_64": 720, "aarch64": 208}  # of glibc's `struct pthread`

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Leave the namespaces in `flags` for new ones (`os.unshare` is of Python 3.12)."""
    _check(_libc.unshare(flags), f"unshare({flags:#x})")


def fork(namespaces: int) -> int:
    """`os.fork` with a child that is in new namespaces from its start, and so the init of its PID namespace."""
    flags, tid = namespaces | signal.SIGCHLD, _tid_address()
    if tid:
        flags |= _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID
    number = _ARGUMENT_CALLS[platform.machine()]["clone"]
    arguments = (0, tid, 0) if platform.machine() == "x86_64" else (0, 0, tid)
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = _locked_libc.syscall(number, ctypes.c_ulong(flags), None, *map(ctypes.c_void_p, arguments))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    _check(min(pid, 0), f"clone({namespaces:#x})")
    return pid


def _tid_address() -> int:
    """Where the C library keeps the number of this thread, which its own fork would renew; 0 where that is not known."""
    _libc.pthread_self.restype = ctypes.c_void_p
    address = _libc.pthread_self() + _TID_OFFSETS.get(platform.machine(), 0)
    return address if ctypes.c_int.from_address(address).value == _thread.get_native_id() else 0


def set_dumpable(on: bool) -> None:
    """Whether other processes of the same user may trace this one and read its memory and files in /proc."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, int(on), 0, 0, 0), "prctl(PR_SET_DUMPABLE)")


def die_with_parent() -> None:
    """Be killed when the parent process ends, however it ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def die_first() -> None:
    """Be what the kernel ends when the machine is out of memory, before anything else."""
    _write("/proc/self/oom_score_adj", b"1000")


def _write(path: str, data: bytes) -> None:
    # Not by `open`: every page that a forked process writes to for the first time costs microseconds
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, data)
    os.close(fd)


def pidfd_open(pid: int) -> int:
    """A descriptor that is readable when the process has ended (`os.pidfd_open` is missing from many builds of Python)."""
    fd = _libc.syscall(_PIDFD_OPEN, pid, 0)
    _check(min(fd, 0), "pidfd_open")
    return fd


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """`mount(2)`."""
    arguments = [os.fsencode(value) if value is not None else None for value in (source, target, kind)]
    _check(_libc.mount(*arguments, ctypes.c_ulong(flags), os.fsencode(options)), f"mount {source} on {target}")


def pivot_root(new_root: str) -> None:
    """Make `new_root`, a mount point, the root folder and forget the old one."""
    os.chdir(new_root)
    machine = platform.machine()
    if machine not in _SYSTEM_CALLS:
        raise OSError(_ENOSYS, f"the sandbox is not written for {machine}")
    number = _SYSTEM_CALLS[machine]["pivot_root"]
    _check(_libc.syscall(number, b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")


def map_user(uid: int, gid: int) -> None:
    """In a new user namespace: be the user and group that one was outside."""
    _write("/proc/self/setgroups", b"deny")
    _write("/proc/self/uid_map", b"%d %d 1" % (uid, uid))
    _write("/proc/self/gid_map", b"%d %d 1" % (gid, gid))


def private_filesystem(scratch_bytes: int) -> None:
    """A mount namespace with an empty, size-bound /tmp and /dev/shm of its own and nothing in /proc."""
    unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS)
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    flags = MS_NOSUID | MS_NODEV
    mount("tmpfs", "/tmp", "tmpfs", flags, f"size={scratch_bytes},nr_inodes=16384,mode=0700")
    mount("tmpfs", "/dev/shm", "tmpfs", flags | MS_NOEXEC, "size=1048576,nr_inodes=64,mode=0700")
    # The processes of neighbours are listed in the /proc of the box
    mount("tmpfs", "/proc", "tmpfs", flags | MS_NOEXEC | MS_RDONLY, "size=4096,mode=0555")


def set_limits(memory_bytes: int, cpu_seconds: int, file_bytes: int, processes: int | None) -> None:
    """Resource limits of this process and of all that it starts. None leaves the limit of processes as it is."""
    for name, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 1),  # no core dump at all; 0 would still start a collector that reads from a pipe
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(name)[1]
        if value is None:
            continue
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))
    # Deep recursion is a legitimate thing in a solution; the address space bounds the stack
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 27 if hard == resource.RLIM_INFINITY else hard, hard))


def drop_privileges() -> None:
    """Give up every capability for good, also for programs that are executed later."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _check(_libc.capset(header, bytes(24)), "capset")


# Denied system calls: the network, other processes' memory, mounts and namespaces, memory that no limit counts, and the
# parts of the kernel that no solution needs and that have been the way out of sandboxes.
_SYSTEM_CALLS = {
    "x86_64": {
        "shmget": 29, "shmat": 30, "shmctl": 31, "socket": 41, "connect": 42, "accept": 43, "bind": 49, "listen": 50,
        "setsockopt": 54, "semget": 64, "semop": 65, "semctl": 66, "msgget": 68, "msgsnd": 69, "msgrcv": 70,
        "msgctl": 71, "flock": 73, "ptrace": 101, "syslog": 103, "personality": 135, "modify_ldt": 154, "pivot_root": 155, "chroot": 161,
        "acct": 163, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169, "iopl": 172,
        "ioperm": 173, "init_module": 175, "delete_module": 176, "quotactl": 179, "io_setup": 206,
        "lookup_dcookie": 212, "semtimedop": 220, "mq_open": 240, "mq_unlink": 241, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250,
        "inotify_init": 253, "unshare": 272, "vmsplice": 278, "accept4": 288, "inotify_init1": 294,
        "perf_event_open": 298, "fanotify_init": 300, "name_to_handle_at": 303, "open_by_handle_at": 304,
        "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313,
        "memfd_create": 319, "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323,
    },
    "aarch64": {
        "shmget": 194, "shmctl": 195, "shmat": 196, "socket": 198, "connect": 203, "accept": 202, "bind": 200,
        "listen": 201, "setsockopt": 208, "semget": 190, "semctl": 191, "semtimedop": 192, "semop": 193, "msgget": 186,
        "msgctl": 187, "msgrcv": 188, "msgsnd": 189, "flock": 32, "ptrace": 117, "syslog": 116, "personality": 92, "pivot_root": 41, "chroot": 51, "acct": 89,
        "mount": 40, "umount2": 39, "swapon": 224, "swapoff": 225, "reboot": 142, "init_module": 105,
        "delete_module": 106, "quotactl": 60, "io_setup": 0, "lookup_dcookie": 18, "mq_open": 180, "mq_unlink": 181, "kexec_load": 104,
        "add_key": 217, "request_key": 218, "keyctl": 219, "unshare": 97, "vmsplice": 75, "accept4": 242,
        "inotify_init1": 26, "perf_event_open": 241, "fanotify_init": 262, "name_to_handle_at": 264,
        "open_by_handle_at": 265, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272,
        "finit_module": 273, "memfd_create": 279, "kexec_file_load": 294, "bpf": 280, "userfaultfd": 282,
    },
}  # fmt: skip
# The same numbers on every architecture
_NEW_SYSTEM_CALLS = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438, "mount_setattr": 442,
    "quotactl_fd": 443, "memfd_secret": 447, "statmount": 457, "listmount": 458, "open_tree_attr": 467, "listns": 470,
}  # fmt: skip
_PIDFD_OPEN, _CLONE3, _OPENAT2 = 434, 435, 437
_SECCOMP = {"x86_64": 317, "aarch64": 277}
# System calls allowed with some arguments: (number of the argument, mask, values, whether the masked argument must be, or
# must not be, one of the values)
_ANY, _RLIMIT_CORE = 0xFFFFFFFF, 4
_ARGUMENTS = {
    "clone": [(0, _ANY_NAMESPACE, (0,), True)],
    # The only sockets are pairs of connected streams (AF_UNIX, SOCK_STREAM, two flags): one for datagrams can be given an
    # address, and neighbours share the network namespace
    "socketpair": [(0, _ANY, (1,), True), (1, _ANY & ~0x80800, (1,), True)],
    # Memory that is shared and of no file outlives the process that filled it, and counts for nobody who did not touch it
    "mmap": [(3, 0x21, (0x21,), False)],
    # A limit of 1 is the only one that keeps a crash from the machine's collector of core dumps
    "setrlimit": [(0, _ANY, (_RLIMIT_CORE,), False)],
    "prlimit64": [(0, _ANY, (0,), True), (1, _ANY, (_RLIMIT_CORE,), False)],
    # Everybody who has a file, on the whole machine, sees these requests of a program: locks (by a process or by an
    # open file), leases and notifications. A larger pipe is memory that no limit counts. And a program must not choose
    # which process gets a signal when a file is ready.
    "fcntl": [(1, _ANY, (6, 7, 8, 10, 15, 37, 38, 1024, 1026, 1031), False)],
    # Whether it is a terminal and how large; closing at an execution; how much is to be read; whether to wait
    "ioctl": [(1, _ANY, (0x5401, 0x802C542A, 0x5413, 0x5450, 0x5451, 0x541B, 0x5421), True)],
    # Only of itself
    "setpriority": [(0, _ANY, (0,), True), (1, _ANY, (0,), True)],
    "sched_setparam": [(0, _ANY, (0,), True)],
    "sched_setscheduler": [(0, _ANY, (0,), True)],
    "sched_setaffinity": [(0, _ANY, (0,), True)],
    "sched_setattr": [(0, _ANY, (0,), True)],
}
_ARGUMENT_CALLS = {
    "x86_64": {
        "mmap": 9, "ioctl": 16, "socketpair": 53, "clone": 56, "fcntl": 72, "setpriority": 141, "sched_setparam": 142,
        "sched_setscheduler": 144, "setrlimit": 160, "sched_setaffinity": 203, "prlimit64": 302, "sched_setattr": 314,
    },
    "aarch64": {
        "mmap": 222, "ioctl": 29, "socketpair": 199, "clone": 220, "fcntl": 25, "setpriority": 140,
        "sched_setparam": 118, "sched_setscheduler": 119, "setrlimit": 164, "sched_setaffinity": 122, "prlimit64": 261,
        "sched_setattr": 274,
    },
}  # fmt: skip
# Denied where neither namespaces nor another user stand between the program and the machine. Landlock covers opening,
# making, moving and removing files, but not their modes, owners, times and attributes.
_SHARED_SYSTEM_CALLS = {
    "x86_64": {
        "truncate": 76, "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "utime": 132,
        "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "getxattr": 191, "lgetxattr": 192, "fgetxattr": 193,
        "listxattr": 194, "llistxattr": 195, "flistxattr": 196, "removexattr": 197, "lremovexattr": 198,
        "fremovexattr": 199, "utimes": 235, "ioprio_set": 251, "migrate_pages": 256, "fchownat": 260, "futimesat": 261,
        "fchmodat": 268, "move_pages": 279, "utimensat": 280,
    },
    "aarch64": {
        "truncate": 45, "fchmod": 52, "fchmodat": 53, "fchownat": 54, "fchown": 55, "setxattr": 5, "lsetxattr": 6,
        "fsetxattr": 7, "getxattr": 8, "lgetxattr": 9, "fgetxattr": 10, "listxattr": 11, "llistxattr": 12,
        "flistxattr": 13, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16, "ioprio_set": 30, "utimensat": 88,
        "migrate_pages": 238, "move_pages": 239,
    },
}  # fmt: skip
_NEW_SHARED_SYSTEM_CALLS = {
    "pidfd_send_signal": 424, "pidfd_open": 434, "process_madvise": 440, "process_mrelease": 448, "fchmodat2": 452,
    "setxattrat": 463, "getxattrat": 464, "listxattrat": 465, "removexattrat": 466, "file_getattr": 468,
    "file_setattr": 469,
}  # fmt: skip
# A path without rights to the file (O_PATH), files without a name (O_TMPFILE), and emptying a file by opening it to be
# read, which Landlock did not see at first
_OPEN_FLAGS = [(0o10000000, (0o10000000,), False), (0o20000000, (0o20000000,), False), (0o1003, (0o1000,), False)]
_OPEN_CALLS = {"x86_64": {"open": (2, 1), "openat": (257, 2)}, "aarch64": {"openat": (56, 2)}}
# The supervisor is asked about these: new processes and threads, and signals
_FORK_CALLS = {"x86_64": {"clone": 56, "fork": 57, "vfork": 58}, "aarch64": {"clone": 220}}
_SIGNAL_CALLS = {
    "x86_64": {"kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297},
    "aarch64": {"kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240},
}
# By these the zygote makes the walls of programs and the supervisor watches them
_MAKE_WALLS = {"clone", "unshare", "mount", "setrlimit", "prlimit64", "ioctl"}
_AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_EPERM, _ENOSYS = 1, 38


def filter_programs(shared: bool = False) -> tuple[bytes, bytes]:
    """
    Two classic BPF programs that answer denied system calls with EPERM; see `seccomp(2)`. The zygote puts up the first, which
    all programs inherit, and each program the second: it denies what the zygote needs to make its walls.
    """
    machine = platform.machine()
    if machine not in _SYSTEM_CALLS:
        raise OSError(_ENOSYS, f"the system-call filter is not written for {machine}")
    denied = _SYSTEM_CALLS[machine] | _NEW_SYSTEM_CALLS
    conditions = {number: _ARGUMENTS[name] for name, number in _ARGUMENT_CALLS[machine].items()}
    late = {number for name, number in (denied | _ARGUMENT_CALLS[machine]).items() if name in _MAKE_WALLS}
    # The flags of clone3 lie in memory; the C library falls back to clone
    common = _filter_program(
        set(denied.values()) - late, {_CLONE3}, {number: conditions[number] for number in conditions.keys() - late}
    )
    denied, conditions = late - conditions.keys(), {number: conditions[number] for number in conditions.keys() & late}
    if not shared:
        return common, _filter_program(denied, set(), conditions)
    denied |= {*_SHARED_SYSTEM_CALLS[machine].values(), *_NEW_SHARED_SYSTEM_CALLS.values()}
    conditions |= {
        number: [(index, *flags) for flags in _OPEN_FLAGS] for number, index in _OPEN_CALLS[machine].values()
    }
    asked = {*_FORK_CALLS[machine].values(), *_SIGNAL_CALLS[machine].values()}
    return common, _filter_program(denied, {_OPENAT2}, conditions, asked)


def _filter_program(
    denied: set[int], absent: set[int], conditions: dict[int, list[tuple]], asked: Collection[int] = ()
) -> bytes:
    load, conjunction, jump_equal, jump_at_least, answer = 0x20, 0x54, 0x15, 0x35, 0x06
    allow, kill, deny, missing, ask = 0x7FFF0000, 0x80000000, 0x00050000 | _EPERM, 0x00050000 | _ENOSYS, 0x7FC00000
    code: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),
        (jump_equal, 1, 0, _AUDIT_ARCHITECTURE[platform.machine()]),
        (answer, 0, 0, kill),
        (load, 0, 0, 0),
        (jump_at_least, 0, 1, 0x40000000),  # the x32 interface has a second number for every call
        (answer, 0, 0, deny),
    ]
    for number in absent:
        code += [(jump_equal, 0, 1, number), (answer, 0, 0, missing)]
    for number in denied:
        code += [(jump_equal, 0, 1, number), (answer, 0, 0, deny)]
    for number, checks in conditions.items():
        block = []
        for index, mask, values, wanted in checks:
            # The lower half of the argument, which is all that these calls look at
            block += [(load, 0, 0, 16 + 8 * index), (conjunction, 0, 0, mask)]
            if wanted:
                block += [(jump_equal, len(values) - place, 0, value) for place, value in enumerate(values)]
                block.append((answer, 0, 0, deny))
            else:
                for value in values:
                    block += [(jump_equal, 0, 1, value), (answer, 0, 0, deny)]
        block.append((answer, 0, 0, ask if number in asked else allow))
        code += [(jump_equal, 0, len(block), number), *block]
    for number in set(asked) - conditions.keys():
        code += [(jump_equal, 0, 1, number), (answer, 0, 0, ask)]
    code.append((answer, 0, 0, allow))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def filter_system_calls(program: bytes, shared: bool = False) -> int:
    """
    Deny what no solution needs, from here on and for all children. Needs `drop_privileges` before.

    Args:
        program (`bytes`): One of `filter_programs`.
        shared (`bool`): Whether the program shares its namespaces with the machine. Then the supervisor is asked about new
            processes and signals.

    Returns:
        `int`: the descriptor by which it is asked, -1 unless `shared`.
    """
    instructions = ctypes.create_string_buffer(program, len(program))
    descriptor = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    if not shared:
        _check(_libc.prctl(_PR_SET_SECCOMP, 2, descriptor, 0, 0), "prctl(PR_SET_SECCOMP)")
        return -1
    listener = _libc.syscall(_SECCOMP[platform.machine()], 1, 8, descriptor)
    _check(min(listener, 0), "seccomp with a listener")
    return listener


class Question:
    """
    A system call that the supervisor is asked about; see `seccomp_unotify(2)`.

    Attributes:
        number (`int`): Of the system call.
        arguments (`tuple[int, ...]`): Its six arguments.
    """

    def __init__(self, listener: int):
        received = bytearray(80)
        fcntl.ioctl(listener, 0xC0502100, received)  # SECCOMP_IOCTL_NOTIF_RECV
        self._listener = listener
        self._id, _, _, self.number, _, _, *arguments = struct.unpack("QIIiIQ6Q", received)
        self.arguments = tuple(arguments)

    def answer(self, error: int = 0) -> None:
        """Let the call go on, or make it fail with an error number. Whoever asked may have ended."""
        response = bytearray(struct.pack("QqiI", self._id, 0, -error, 0 if error else 1))
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._listener, 0xC0182101, response)  # SECCOMP_IOCTL_NOTIF_SEND

    @property
    def is_fork(self) -> bool:
        """Whether it makes a process or a thread; else it sends a signal."""
        return self.number in _FORK_CALLS[platform.machine()].values()

    @property
    def target(self) -> int:
        """The process that a signal is for; 0 is the group of the sender, and below are other groups."""
        (target,) = struct.unpack("i", struct.pack("I", self.arguments[0] & _ANY))
        return target


# Landlock: `landlock(7)`
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL_DEV = 1, 2, 4, 8, 1 << 14, 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_MAKE_DEVICES = 1 << 6 | 1 << 11
_RIGHTS_OF_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
READ = _EXECUTE | _READ_FILE | _READ_DIR
LIST = _READ_DIR
READ_WRITE = _READ_FILE | _WRITE_FILE | _READ_DIR | _TRUNCATE
ALL = (1 << 15) - 1 & ~_MAKE_DEVICES


def landlock_version() -> int:
    """Version of the kernel's Landlock; 0 where it has none or does not use it."""
    return max(0, _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))


class Landlock:
    """
    Rules of what may be done with files; all else is denied.

    Args:
        version (`int`): Of Landlock: what it covers grew with it.
        scoped (`bool`): Whether signals and abstract sockets stay inside as well, from version 6.
    """

    def __init__(self, version: int, scoped: bool):
        self._handled = max(rights for since, rights in _RIGHTS_OF_VERSION.items() if since <= version)
        attributes = struct.pack("QQQ", self._handled, 3, 3 if scoped else 0)  # files, TCP, scope
        attributes = attributes[: 8 if version < 4 else 16 if version < 6 else 24]
        self._fd = _libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
        _check(min(self._fd, 0), "landlock_create_ruleset")

    def allow(self, fd: int, rights: int) -> None:
        """Allow some of `READ`, `LIST`, `READ_WRITE` and `ALL` for a file, or for a folder and all that is in it."""
        rights &= self._handled
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _FILE_RIGHTS
        rule = struct.pack("=Qi", rights, fd)
        _check(_libc.syscall(_LANDLOCK_ADD, self._fd, 1, rule, 0), "landlock_add_rule")

    def move_to(self, lowest: int) -> int:
        """Use a descriptor that is `lowest` or above; returns it."""
        self._fd, old = fcntl.fcntl(self._fd, fcntl.F_DUPFD_CLOEXEC, lowest), self._fd
        os.close(old)
        return self._fd

    def restrict(self) -> None:
        """Put the rules into force for this process and all its children, for good. Needs `drop_privileges` before."""
        _check(_libc.syscall(_LANDLOCK_RESTRICT, self._fd, 0), "landlock_restrict_self")
        os.close(self._fd)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")
