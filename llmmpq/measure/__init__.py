"""What each candidate does to the model: input moments, losses, the Gram matrix."""
