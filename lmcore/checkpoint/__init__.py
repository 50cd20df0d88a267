"""Verified checkpoints: written whole or not at all."""
