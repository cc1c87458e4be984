"""The networks that the experiments train, and measures over their layers."""
