"""Training: recipes, precision, loss, optimiser and the trainer."""
