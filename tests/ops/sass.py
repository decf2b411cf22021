"""What ptxas makes of a kernel on an H100 (sm_90), without one."""

import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_ALIGNED = [["tt.divisibility", 16]]


def sass(kernel, arguments, folder, num_warps=4, num_stages=3):
    """Machine code as text.

    Args:
        arguments: by name, a constexpr's value, or a type: `"*bf16"`, `"*i32"`, `"i32"`, `"fp32"`. Pointers, and
            integers named in `"i32:16"`, are multiples of 16.
        folder: for the binary.
    """
    names = kernel.arg_names
    types = {name: value for name, value in arguments.items() if isinstance(value, str)}
    source = ASTSource(
        kernel,
        signature={name: types.get(name, "constexpr").removesuffix(":16") for name in names},
        constexprs={(names.index(name),): value for name, value in arguments.items() if name not in types},
        attrs={(names.index(name),): _ALIGNED for name, t in types.items() if t[0] == "*" or t.endswith(":16")},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    binary = Path(folder) / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    [tool] = Path(triton.__file__).parent.rglob("nvidia/bin/cuobjdump")
    return subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True).stdout
