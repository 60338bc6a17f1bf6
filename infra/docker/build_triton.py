"""Build the module by which Triton speaks to CUDA's driver, on a machine without one: `python build_triton.py FOLDER`.

Triton builds it with a C compiler at a process's first kernel, and keeps it in TRITON_CACHE_DIR, which FOLDER is to be, by a
name that depends on its source and on what Python says of the platform: the image that uses it must have the program `file`
where this one has it.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    os.environ["TRITON_CACHE_DIR"] = sys.argv[1]
    from triton.runtime.build import compile_module_from_src

    package = importlib.util.find_spec("triton.backends.nvidia")
    assert package is not None and package.submodule_search_locations
    nvidia = Path(package.submodule_search_locations[0])
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder, "libcuda.so.1")  # its functions are found where the module is loaded
        subprocess.run(["gcc", "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libcuda.so.1", "-o", empty], check=True)
        compiler = Path(folder, "cc")  # a library of which nothing is used yet is to be named in the module all the same
        compiler.write_text('#!/bin/sh\nexec gcc -Wl,--no-as-needed "$@"\n')
        compiler.chmod(0o755)
        os.environ["CC"] = str(compiler)
        try:
            compile_module_from_src(
                src=(nvidia / "driver.c").read_text(),
                name="cuda_utils",
                library_dirs=[str(nvidia / "lib"), folder],
                include_dirs=[str(nvidia / "include")],
                libraries=["libcuda.so.1"],
            )
        except ImportError as error:
            print(f"built; it cannot be loaded here: {error}")
    built = next(Path(sys.argv[1]).rglob("cuda_utils*.so"))
    print(f"{built}: {built.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
