"""A causal language model with its loss and its optimizer."""
