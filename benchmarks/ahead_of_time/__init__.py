"""What compilers say of the kernels, without the device."""
