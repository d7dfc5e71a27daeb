"""What may happen to gradients between backward and update."""
