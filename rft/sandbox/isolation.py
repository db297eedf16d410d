"""How a sandbox worker shuts itself in. Standard library only: the worker is started by path, outside any package.

In order of strength, as far as the kernel permits: its own process, network, IPC and mount namespaces with a new file
tree (Python and the system's libraries read-only, nothing of the user, one size-limited folder), an unprivileged user
nobody else has, resource limits. `Protection` says what is in force; nothing is assumed.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rft.sandbox.tree import LAYERS, LIBC, MNT_DETACH, TREE, mount, show_read_only, show_writable
else:
    from tree import LAYERS, LIBC, MNT_DETACH, TREE, mount, show_read_only, show_writable

MAX_PROCESSES = 64
MAX_OPEN_FILES = 256
ADDRESS_SPACE_FACTOR = 3
WATCH_S = 0.1
MAX_INODES = 20_000  # files and folders a call may make
FIRST_USER_ID, NUM_USER_IDS = 1_500_000_000, 500_000_000  # far above the ids that accounts and containers use
NEW_MOUNT, NEW_USER, NEW_PID, NEW_NET, NEW_IPC = 0x20000, 0x10000000, 0x20000000, 0x40000000, 0x08000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 38
CAP_DAC_READ_SEARCH = 1 << 2
CAPABILITY_VERSION_3 = 0x20080522
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    *(1, 2, 4, 8),
    *(32, 4096, 16384, 1 << 18),
)
MOUNT_FLAGS = {  # a bind mount must keep these of what it shows, or an unprivileged remount is refused
    "ro": MS_RDONLY,
    "nosuid": MS_NOSUID,
    "nodev": MS_NODEV,
    "noexec": MS_NOEXEC,
    "noatime": 1024,
    "nodiratime": 2048,
    "relatime": 1 << 21,
}
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}  # glibc has no function for this system call
SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
LINKS = {"/dev/fd": "fd", "/dev/stdin": "fd/0", "/dev/stdout": "fd/1", "/dev/stderr": "fd/2"}  # into /proc/self
WRITABLE = "/scratch"  # of the new tree it can be written, and a writable TREE; /tmp and /dev/shm lead there


@dataclass(frozen=True)
class Protection:
    """What holds the code we run. `is_init`: this process is number 1 of its own process namespace."""

    is_init: bool
    has_own_files: bool
    has_own_user: bool
    is_process_count_limited: bool
    max_processes: int = MAX_PROCESSES
    tree: str = ""  # how the folder that the code works in is shown

    def in_words(self, settings: dict[str, Any]) -> str:
        memory, disk = f"{settings['memory_bytes'] / 2**30:.3g} GiB", f"{settings['disk_bytes'] / 2**30:.3g} GiB"
        network = "none" if self.is_init else "NOT isolated (the kernel refuses namespaces)"
        processes = "own namespace" if self.is_init else "NOT isolated"
        count = f"at most {self.max_processes}" if self.is_process_count_limited else "number NOT limited"
        user = "an unprivileged one of its own" if self.has_own_user else "the one who runs rft"
        if self.has_own_files:
            files = "own tree, nothing of the user's in it"
            files += f" but {settings['tree']['folder']} ({self.tree})" if self.tree else ""
        elif self.has_own_user:
            files = "read as rft's user (NOT isolated), written only where everyone may"
        else:
            files = "read and written as rft's user (NOT isolated)"
        return (
            f"network: {network}; processes: {processes}, {count}; user: {user}; files: {files}; "
            f"memory: {memory}{' in all' if self.is_init else ' a process'}; "
            f"disk: {disk}{' in all' if self.has_own_files else ' a file'}"
        )


def isolate(settings: dict[str, Any]) -> Protection:
    """Shut this process in. Raises OSError when Python itself would be out of reach inside.

    With a folder to show in `settings["tree"]` it is raised, too, when there can be no file tree of its own.
    """
    is_root = os.geteuid() == 0
    uid = new_user_id() if is_root else None
    has_namespaces, has_user_namespace = unshare()
    if has_namespaces:
        become_init(settings["memory_bytes"])
    elif settings.get("tree"):
        raise PermissionError("the kernel refuses namespaces, without which nothing would be protected")
    shown = build_tree(settings, uid) if has_namespaces else None
    has_own_files = shown is not None
    if has_user_namespace:
        set_capabilities(0)  # what it gave (mounts, interfaces) is not for the code we run
    has_own_user = uid is not None and drop_user(uid, keep_reading=not has_own_files)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which clears it
    LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # the code's processes have our user id: they must not trace us
    if not os.access(os.__file__, os.R_OK):
        raise PermissionError(f"{os.path.dirname(os.__file__)} cannot be read by other users: chmod -R a+rX it")
    is_limited = has_own_user or (has_user_namespace and not is_root)  # root is exempt from the limit
    set_limits(settings, is_limited, is_watched=has_own_files)
    max_processes = settings.get("max_processes", MAX_PROCESSES)
    return Protection(has_namespaces, has_own_files, has_own_user, is_limited, max_processes, shown or "")


# --- namespaces ------------------------------------------------------------------------------------------------------


def unshare(namespaces: int = NEW_NET | NEW_IPC | NEW_PID | NEW_MOUNT) -> tuple[bool, bool]:
    """(own network, process, IPC and mount namespaces, own user namespace), as far as the kernel permits."""
    if os.geteuid() == 0 and LIBC.unshare(namespaces) == 0:
        return True, False
    uid, gid = os.geteuid(), os.getegid()
    if LIBC.unshare(namespaces | NEW_USER) != 0:
        return False, False
    for name, text in [("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")]:
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True, True


def become_init(memory_bytes: int) -> None:
    """Continue in a fork that is process 1 of the new namespace; the original waits and ends as it ends.

    Meanwhile it ends a fork whose own memory grows beyond `memory_bytes`: code runs in it while it is loaded.
    """
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)  # the new tree's, later, does not show the fork to us
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    pid = os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        os.close(proc)
        return
    os.closerange(3, proc)  # the socket must close when the worker dies
    os.closerange(proc + 1, MAX_OPEN_FILES)
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        signal.sigtimedwait({signal.SIGCHLD}, WATCH_S)
        if resident_bytes(proc, pid) > memory_bytes:
            os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def resident_bytes(proc: int, pid: int) -> int:
    """Of a process that may just have ended; proc: an open /proc that shows it."""
    try:
        with open(os.open(f"{pid}/statm", os.O_RDONLY, dir_fd=proc), "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


# --- files -----------------------------------------------------------------------------------------------------------


def build_tree(settings: dict[str, Any], uid: int | None) -> str | None:
    """Exchange the file tree for one that holds what Python needs; None, and the old one, where that is refused.

    Otherwise how `settings["tree"]` is shown in it. Raises OSError when it cannot be.
    """
    root, old, tree = os.getcwd(), os.environ.copy(), settings.get("tree")
    try:
        mount("", "/", "", MS_REC | MS_PRIVATE)
        mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
        for path in [*SYSTEM_FOLDERS, *SYSTEM_FILES, *DEVICES, *python_folders(with_packages=not tree)]:
            show(root, path)
        os.makedirs(f"{root}/proc", exist_ok=True)
        mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        for link in ("/dev/shm", "/tmp"):
            if not os.path.lexists(root + link):  # Python itself may live below /tmp
                os.symlink(WRITABLE, root + link)
        for link, target in LINKS.items():
            os.symlink(f"/proc/self/{target}", root + link)
        for folder in (WRITABLE, *((TREE, LAYERS) if tree else ())):
            os.mkdir(root + folder)
        shown = show_read_only(root, tree["folder"], uid) if tree and not tree["is_writable"] else ""
        make_read_only(root)
        mount("", root, "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
        options = f"size={settings['disk_bytes']},nr_inodes={settings.get('max_files', MAX_INODES)},mode=1777"
        if tree and tree["is_writable"]:
            shown = show_writable(root, tree["folder"], uid, options, WRITABLE)
        else:
            mount("tmpfs", root + WRITABLE, "tmpfs", MS_NOSUID | MS_NODEV, options)
        enter(root)
    except OSError:
        if tree:
            raise
        LIBC.umount2(os.fsencode(root), MNT_DETACH)
        os.chdir(root)
        os.environ.update(old)
        return None
    os.environ.update(HOME=WRITABLE, TMPDIR=WRITABLE)
    return shown


def python_folders(with_packages: bool) -> list[str]:
    """Where this interpreter and its standard library are, beyond the system's folders; and its packages."""
    folders = {sys.base_prefix, os.path.dirname(os.__file__), os.path.dirname(os.path.realpath(sys.executable))}
    if with_packages:
        own = {os.path.dirname(os.path.abspath(__file__))}
        folders |= {sys.prefix, sys.exec_prefix} | {folder for folder in sys.path if os.path.isdir(folder)} - own
    outside = [path for path in folders if not path.startswith("/usr/") and path not in ("/", "/usr")]
    return sorted(path for path in outside if not any(path.startswith(f"{other}/") for other in outside))


def show(root: str, path: str) -> None:
    """Make `path` appear in the new tree: a symbolic link as itself, a folder or file as a bind mount."""
    target = root + path
    if not os.path.lexists(path) or os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path) and path in SYSTEM_FOLDERS:
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    mount(path, target, "", MS_BIND | MS_REC)


def make_read_only(root: str) -> None:
    """Every mount under the new tree; what is mounted inside a bound folder came along and is one of its own."""
    with open("/proc/self/mountinfo") as file:
        lines = [line.split() for line in file]
    for fields in lines:
        path = fields[4].encode().decode("unicode_escape")  # blanks are written as \040
        if path.startswith(f"{root}/") and path != f"{root}/proc":
            flags = sum(MOUNT_FLAGS.get(option, 0) for option in set(fields[5].split(",")) - {"ro"})
            mount("", path, "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | flags & ~MS_NOSUID)


def enter(root: str) -> None:
    """Make `root` the root and let go of the old one."""
    os.chdir(root)
    number = PIVOT_ROOT.get(os.uname().machine)
    if number is None or LIBC.syscall(number, b".", b".") != 0:
        raise OSError(ctypes.get_errno(), "pivot_root failed")
    if LIBC.umount2(b".", MNT_DETACH) != 0:
        raise OSError(ctypes.get_errno(), "the old file tree cannot be left")
    os.chdir(WRITABLE)


# --- privileges and limits -------------------------------------------------------------------------------------------


def new_user_id() -> int:
    """One that nobody else has."""
    number: int = struct.unpack("!I", os.urandom(4))[0]
    return FIRST_USER_ID + number % NUM_USER_IDS


def drop_user(uid: int, keep_reading: bool) -> bool:
    """From root to an ordinary user, without capabilities.

    keep_reading: the old file tree is in sight, and Python may live in root's home: keep the right to read it.
    """
    if keep_reading and not capabilities() & CAP_DAC_READ_SEARCH:
        return False
    os.chown(".", uid, uid)
    LIBC.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    set_capabilities(CAP_DAC_READ_SEARCH if keep_reading else 0)
    return True


def capabilities() -> int:
    """The permitted capabilities of this process, as a bit set."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("CapPrm:"))


def set_capabilities(bits: int) -> None:
    header, sets = struct.pack("II", CAPABILITY_VERSION_3, 0), struct.pack("6I", bits, bits, 0, 0, 0, 0)
    if LIBC.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset failed")


def set_limits(settings: dict[str, Any], is_limited: bool, is_watched: bool) -> None:
    """is_watched: memory in use is measured, so address space, of which libraries take much more, may be larger."""
    limits = [
        (resource.RLIMIT_AS, settings["memory_bytes"] * (ADDRESS_SPACE_FACTOR if is_watched else 1)),
        (resource.RLIMIT_FSIZE, settings["disk_bytes"]),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ]
    if is_limited:
        limits.append((resource.RLIMIT_NPROC, settings.get("max_processes", MAX_PROCESSES)))
    for kind, limit in limits:
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
