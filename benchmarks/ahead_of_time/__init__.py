"""What compilers say about the kernels, on machines without the device."""
