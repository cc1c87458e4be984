"""A launch for each pass over the plan: heads that shared memory cannot hold."""
