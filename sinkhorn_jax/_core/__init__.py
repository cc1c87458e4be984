"""One matrix of logits: the iteration, its adjoint, and their options."""
