"""Machine code for the CPU, made by the LLVM inside numba's wheel at first use and kept on disk: no compiler needed."""
