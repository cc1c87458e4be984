"""One matrix of logits: the iteration, its adjoint, and the options that steer them."""
