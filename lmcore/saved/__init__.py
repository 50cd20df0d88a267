"""Trained models: load, generate, score, export."""
