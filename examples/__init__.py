"""Small programs that use a checkpoint."""
