"""Commands of tests where no network is: in a namespace that has only loopback."""

from __future__ import annotations

import shutil
import subprocess

import pytest

_ONLY_LOOPBACK = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def without_network(command: list[str]) -> list[str]:
    """`command` in a network namespace that has only loopback, where this machine allows one."""
    is_possible = shutil.which("unshare") and shutil.which("ip")
    if is_possible and subprocess.run([*_ONLY_LOOPBACK, "true"], capture_output=True).returncode == 0:
        return [*_ONLY_LOOPBACK, *command]
    pytest.skip("needs unshare, ip and the right to make a network namespace")
