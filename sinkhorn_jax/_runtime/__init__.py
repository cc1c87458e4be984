"""Many matrices: choosing an implementation, batching under `vmap`, and sharding."""
