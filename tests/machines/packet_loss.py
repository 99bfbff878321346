"""A program for the kernel that drops packets by chance, where it has no ``netem`` to do it.

Instructions are as <linux/bpf.h> has them: 8 bits of code, 4 and 4 of registers, 16 of an offset, 32 of
a constant.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

# Of bpf(2): the call, its command, and the kind of program.
SYSTEM_CALLS = {"x86_64": 321, "aarch64": 280}
PROG_LOAD, SCHED_CLS = 5, 3
CALL, AND32, JUMP_IF_GREATER, SET, EXIT = 0x85, 0x54, 0x25, 0xB7, 0x95
RANDOM_U32 = 7
# What a packet's program returns.
PASS, DROP = 0, 2
# Random numbers without their sign, which constants have.
LARGEST = 0x7FFFFFFF


def dropping_program(fraction: float) -> int:
    """A descriptor of a program that drops this fraction of the packets, each by its own chance.

    Raises:
        OSError: this kernel takes none, or not from this user.
    """
    program = b"".join(
        struct.pack("<BBhi", code, 0, offset, constant)
        for code, offset, constant in (
            (CALL, 0, RANDOM_U32),
            (AND32, 0, LARGEST),
            (JUMP_IF_GREATER, 2, int(fraction * LARGEST)),
            (SET, 0, DROP),
            (EXIT, 0, 0),
            (SET, 0, PASS),
            (EXIT, 0, 0),
        )
    )
    code, license_ = ctypes.create_string_buffer(program), ctypes.create_string_buffer(b"GPL")
    addresses = ctypes.addressof(code), ctypes.addressof(license_)
    asked = struct.pack(
        "<IIQQIIQII16s", SCHED_CLS, len(program) // 8, *addresses, 0, 0, 0, 0, 0, b""
    )
    number = SYSTEM_CALLS.get(platform.machine())
    if number is None:
        raise OSError(f"the number of bpf(2) is not known on {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(number, PROG_LOAD, ctypes.create_string_buffer(asked), len(asked))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return descriptor
