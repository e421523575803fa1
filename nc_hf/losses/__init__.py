"""Losses on features and on logits; torch only."""
