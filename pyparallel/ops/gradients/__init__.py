"""Parameters that stay as they are forward, and whose gradients are summed over ranks backward."""
