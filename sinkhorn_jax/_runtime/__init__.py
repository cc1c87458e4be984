"""Many matrices at once: choosing an implementation, batching, and sharding."""
