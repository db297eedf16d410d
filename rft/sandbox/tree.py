"""A folder shown to a sandbox: read-only, or copy-on-write in memory. Standard library only, see isolation.py.

Copy-on-write is overlayfs with the folder below and a size-limited tmpfs above it; where the kernel refuses that, a
copy of the folder in the tmpfs. The folder itself is never written, and what was written ends with the namespace.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import struct

LIBC = ctypes.CDLL(None, use_errno=True)
TREE = "/tree"  # where it appears
LAYERS = "/.layers"  # what it is made of, hidden once it is made: code that wrote there could confuse the overlay
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442  # the same on every machine; glibc may lack the functions
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE, OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH = -100, 0x1000, 0x8000, 1, 4
MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_IDMAP, NEW_USER = 2, 4, 0x100000, 0x10000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MNT_DETACH = 2, 4, 4096, 16384, 2


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2). Raises OSError."""
    arguments = (os.fsencode(text) if text else None for text in (source, target, kind))
    if LIBC.mount(*arguments, ctypes.c_ulong(flags), os.fsencode(options) if options else None) != 0:
        raise OSError(ctypes.get_errno(), f"mount on {target} failed")


def bind(source: str, target: str, uid: int | None, proc: str) -> bool:
    """Make `source` appear at `target`; with a uid, what belongs to its owner belongs to that user there.

    False when the kernel or the file system cannot map owners, and they are as they were. proc: a /proc that shows our
    children. Raises OSError.
    """
    if uid is not None and bind_mapped(source, target, uid, proc):
        return True
    mount(source, target, "", MS_BIND | MS_REC)
    return uid is None


def bind_mapped(source: str, target: str, uid: int, proc: str) -> bool:
    try:
        users = mapping(os.stat(source), uid, proc)
    except OSError:  # root may be refused user namespaces, too
        return False
    clone = LIBC.syscall(OPEN_TREE, AT_FDCWD, os.fsencode(source), OPEN_TREE_CLONE | os.O_CLOEXEC | AT_RECURSIVE)
    try:
        attributes = struct.pack("QQQQ", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_IDMAP, 0, 0, users)
        flags = AT_EMPTY_PATH | AT_RECURSIVE
        if clone < 0 or LIBC.syscall(MOUNT_SETATTR, clone, b"", flags, attributes, len(attributes)) != 0:
            return False
        moved: int = LIBC.syscall(MOVE_MOUNT, clone, b"", AT_FDCWD, os.fsencode(target), MOVE_MOUNT_F_EMPTY_PATH)
        return moved == 0
    finally:
        os.close(users)
        if clone >= 0:
            os.close(clone)


def mapping(owner: os.stat_result, uid: int, proc: str) -> int:
    """An open user namespace in which the owner of a folder is `uid`; it lives as long as what uses it."""
    ready, is_ready = os.pipe()
    go_on, may_go_on = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(may_go_on)
        os.write(is_ready, b"1" if LIBC.unshare(NEW_USER) == 0 else b"0")
        os.read(go_on, 1)  # ends when the parent has it, or is dead
        os._exit(0)
    try:
        os.close(is_ready)
        if os.read(ready, 1) != b"1":
            raise OSError("the kernel refuses a user namespace")
        for name, number in (("uid_map", owner.st_uid), ("gid_map", owner.st_gid)):
            with open(f"{proc}/{pid}/{name}", "w") as file:
                file.write(f"{number} {uid} 1")
        return os.open(f"{proc}/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for fd in (ready, go_on, may_go_on):
            os.close(fd)
        os.waitpid(pid, 0)


def show_read_only(root: str, source: str, uid: int | None) -> str:
    """Show it in the new tree below `root`; the caller makes the mount read-only. Says how."""
    is_whole = bind(source, root + TREE, uid, f"{root}/proc")
    return "read-only" if is_whole else "read-only, without what only its owner may read"


def show_writable(root: str, source: str, uid: int | None, options: str, scratch: str) -> str:
    """Show it copy-on-write, with the scratch folder on the same size-limited tmpfs. Says how. Raises OSError."""
    layers = root + LAYERS
    mount("tmpfs", layers, "tmpfs", MS_NOSUID | MS_NODEV, options)
    for name in ("lower", "upper", "work", "scratch"):
        os.mkdir(f"{layers}/{name}", 0o777)
    os.chmod(f"{layers}/scratch", 0o1777)
    mount(f"{layers}/scratch", root + scratch, "", MS_BIND)
    is_mapped = bind(source, f"{layers}/lower", uid, f"{root}/proc")
    problem = overlay(layers, root + TREE, uid) if is_mapped else "its file system cannot map owners"
    if problem:
        copy(source, f"{layers}/upper", uid)
        mount(f"{layers}/upper", root + TREE, "", MS_BIND)
    LIBC.umount2(os.fsencode(layers), MNT_DETACH)
    return f"copied ({problem}): slower to open" if problem else "copy-on-write"


def overlay(layers: str, target: str, uid: int | None) -> str:
    """Mount it; why not, where the kernel refuses. The options name folders by short paths: no comma, no colon."""
    own(f"{layers}/upper", os.stat(f"{layers}/lower"), uid)
    before = os.getcwd()
    os.chdir(layers)
    try:
        options = "lowerdir=lower,upperdir=upper,workdir=work"
        is_root = uid is not None
        mount("overlay", target, "overlay", MS_NOSUID | MS_NODEV, options if is_root else f"{options},userxattr")
        return ""
    except OSError as error:
        return f"no overlayfs: {os.strerror(error.errno or 0)}"
    finally:
        os.chdir(before)


def own(path: str, like: os.stat_result, uid: int | None) -> None:
    os.chmod(path, stat.S_IMODE(like.st_mode), follow_symlinks=True)
    if uid is not None:
        os.chown(path, uid, uid)


def copy(source: str, target: str, uid: int | None) -> None:
    """Copy folders, files and symbolic links. Raises OSError when they need more than there is."""
    room, size = os.statvfs(target), tree_size(source)
    room_bytes = room.f_bavail * room.f_frsize
    if size > room_bytes:
        problem = f"{source} must be copied, and has {size:,} bytes: more than the {room_bytes:,} of disk_bytes"
        raise OSError(problem)
    shutil.copytree(source, target, symlinks=True, copy_function=copy_file, dirs_exist_ok=True)
    if uid is not None:
        for folder, _, files in os.walk(target):
            for path in (folder, *(f"{folder}/{name}" for name in files)):
                os.lchown(path, uid, uid)


def copy_file(source: str, target: str) -> None:
    """A regular file with its mode and times; pipes, sockets and devices are left out."""
    if stat.S_ISREG(os.lstat(source).st_mode):
        shutil.copy2(source, target)


def tree_size(folder: str) -> int:
    """Bytes of the regular files in it."""
    paths = (f"{inside}/{name}" for inside, _, names in os.walk(folder) for name in names)
    return sum(status.st_size for status in map(os.lstat, paths) if stat.S_ISREG(status.st_mode))
