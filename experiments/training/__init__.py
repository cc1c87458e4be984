"""The command `train`: runs of one encoder that outlast a killed process."""
