"""Mojo kernels: signature, and the way from a model's code to kernel.so. Follows programs/compiling.py in a `source`.

The code is a module of its own, called by one that a model cannot touch. The compiler runs in the sandbox, without a
network (it would report its use), and interprets compile-time code, for which it knows no system call. gcc links its
object without Mojo's runtime, so runner and filter are those of C: the heap is the C library's, threads do not link.
"""

import os
import re
import shutil
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __name__ != "source":  # in the sandbox this is one text with it
    from rft.envs.tasks.kernels.programs.compiling import COMPILE_S, LANGUAGES, Language, execute, gcc_path

MOJO_VERSION = "1.2.0"  # of a language that still changes
MOJO_CURE = (
    f"pip install mojo-compiler=={MOJO_VERSION} where rft is installed (Linux, 85 MB, under a licence of its own)"
)
MOJO_BUILD_S = 30.0  # it takes 3 s of CPU time
MOJO_MEMORY_BYTES = 4 << 30  # of address space, of which its allocator reserves much; it uses 0.25 GB
MOJO_CALLER = """
from kernel import {name}

comptime Floats = Pointer[Float32, MutAnyOrigin]

@export
def rft_call(p: Pointer[Floats, MutAnyOrigin], f: Floats, n: Pointer[Int32, MutAnyOrigin]) abi("C"):
    {name}({arguments})
"""

# What the standard library asks of Mojo's runtime to allocate, and to report an index that is out of range. The runtime
# itself would need 2 GiB of addresses and system calls (poll, rt_sigprocmask, ...) that a kernel does not have.
MOJO_RUNTIME = """
#include <stdlib.h>
void *KGEN_CompilerRT_AlignedAlloc(ssize_t alignment, ssize_t size_bytes) {
    void *memory = 0;
    size_t least = alignment <= 0 ? 64 : alignment < (ssize_t)sizeof(void *) ? sizeof(void *) : alignment;
    return posix_memalign(&memory, least, size_bytes) ? 0 : memory;
}
void KGEN_CompilerRT_AlignedFree(void *memory) { free(memory); }
int KGEN_CompilerRT_fprintf(void *file, const char *format, ...) { return 0; }
"""
MOJO_LINK = ["-O2", "-w", "-fPIC", "-shared", "-nostdlib", "-Wl,-z,defs", "-x", "c", "-", "-x", "none"]


def mojo_signature(item: dict[str, Any]) -> str:
    """How a kernel of this row begins, without its colon: `def relu(y: Pointer[Float32, MutAnyOrigin], n: Int)`."""
    arguments = []
    for pointer in item["pointers"]:
        kind, origin = "Int32" if pointer["is_int"] else "Float32", "Mut" if pointer["is_out"] else "Immut"
        arguments.append(f"{pointer['name']}: Pointer[{kind}, {origin}AnyOrigin]")
    arguments += [f"{name}: Float32" for name in item["floats"]] + [f"{name}: Int" for name in item["ints"]]
    return f"def {item['kernel']}({', '.join(arguments)})"


def mojo_caller(item: dict[str, Any]) -> str:
    """The module with rft_call (see RUNNER in grader.py)."""
    casts = [".unsafe_bitcast[Int32]()" if pointer["is_int"] else "" for pointer in item["pointers"]]
    arguments = [f"p[unsafe_offset={i}]{cast}" for i, cast in enumerate(casts)]
    arguments += [f"f[unsafe_offset={i}]" for i in range(len(item["floats"]))]
    arguments += [f"Int(n[unsafe_offset={i}])" for i in range(len(item["ints"]))]
    return MOJO_CALLER.format(name=item["kernel"], arguments=", ".join(arguments))


def mojo_root() -> str:
    """The compiler's folder. Raises RuntimeError with the cure where there is none, or one of another version."""
    for folder in sys.path:
        root = os.path.join(os.path.abspath(folder), "modular")
        if os.access(f"{root}/bin/mojo", os.X_OK):
            if not os.path.isdir(os.path.join(folder, f"mojo_compiler-{MOJO_VERSION}.dist-info")):
                raise RuntimeError(f"the Mojo in {root} is not version {MOJO_VERSION}; {MOJO_CURE}")
            return root
    raise RuntimeError(f"there is no Mojo compiler; {MOJO_CURE}")


def build_mojo(item: dict[str, Any], code: str) -> str:
    root, folder = mojo_root(), os.path.abspath("mojo")
    os.mkdir(folder)
    try:
        for name, text in (("kernel", code), ("caller", mojo_caller(item))):
            with open(f"{folder}/{name}.mojo", "w", encoding="utf-8", errors="replace", newline="") as file:
                file.write(text)
        return mojo_object(root, folder) or mojo_linked(f"{folder}/kernel.o")
    finally:
        shutil.rmtree(folder)


def mojo_object(root: str, folder: str) -> str:
    """Compile to kernel.o in the folder, which is also the compiler's home; "" or what it said."""
    settings = {
        "HOME": folder,
        "TMPDIR": folder,
        "MODULAR_MOJO_MAX_PACKAGE_ROOT": root,
        "MODULAR_MOJO_MAX_DRIVER_PATH": f"{root}/bin/mojo",
        "MODULAR_MOJO_MAX_IMPORT_PATH": f"{root}/lib/mojo",
        "MODULAR_TELEMETRY_ENABLED": "0",
        "MODULAR_CRASH_REPORTING_ENABLED": "0",
    }
    command = [f"{root}/bin/mojo", "build", "--emit", "object", "--num-threads", "1", "--disable-warnings"]
    command += [f"{folder}/caller.mojo", "-o", f"{folder}/kernel.o"]
    status, _, errors = execute(command, "", MOJO_BUILD_S, MOJO_MEMORY_BYTES, settings)
    if status == 0 and os.path.isfile(f"{folder}/kernel.o"):
        return ""
    return errors.replace(f"{folder}/", "").strip() or "the compiler did not end in time"


def mojo_linked(path: str) -> str:
    """Link the object to kernel.so; "" or what is missing."""
    command = [gcc_path(), *MOJO_LINK, path, "-lm", "-lc", "-lgcc", "-o", "kernel.so"]
    status, _, errors = execute(command, MOJO_RUNTIME, COMPILE_S)
    if status == 0 and os.path.isfile("kernel.so"):
        return ""
    missing = sorted(set(re.findall(r"undefined reference to `(\w+)'", errors)))
    return (
        f"error: a kernel cannot use {', '.join(missing)}" if missing else errors.strip() or "error: cannot be linked"
    )


# It optimises for this processor; so must gcc, or a simple relu would be three to five times as fast as the naive one.
LANGUAGES["mojo"] = Language(build_mojo, r"\bdef {name}\s*\(", ["-O3", "-march=native"])
