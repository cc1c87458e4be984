"""Reports of compilers about the kernels, on machines without the device."""
