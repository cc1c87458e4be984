"""How a benchmark is timed, checked and recorded."""
