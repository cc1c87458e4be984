"""One launch for all iterations, with the kernel matrix of a head in shared memory."""
