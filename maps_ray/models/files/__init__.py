"""Files of checkpoints: formats of tensors, folders, weights."""
