"""Tables and figures from the recorded rows."""
