"""Distillation: pure loss terms, taps into networks, projections between them."""
