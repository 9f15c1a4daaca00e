"""Contrastive losses: one file each."""
