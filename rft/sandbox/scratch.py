"""Emptying a folder that hostile code has filled. Standard library only, see isolation.py."""

from __future__ import annotations

import os


def empty(folder: str) -> None:
    """Remove what is in `folder`, without recursion and without long paths: a call may nest folders without end."""
    os.chmod(folder, 0o700)
    inside: list[str] = []
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    while True:
        child = remove_files(fd)
        if child is not None:
            os.chmod(child, 0o700, dir_fd=fd)
            inside.append(child)
        elif not inside:
            return os.close(fd)
        after = os.open(child or "..", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        os.close(fd)
        fd = after
        if child is None:
            os.rmdir(inside.pop(), dir_fd=fd)


def remove_files(folder_fd: int) -> str | None:
    """Unlink until a folder is met, and return its name; None when nothing is left."""
    with os.scandir(folder_fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                return entry.name
            os.unlink(entry.name, dir_fd=folder_fd)
    return None
