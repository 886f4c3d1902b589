"""Distillation: loss functions, loss terms and the training task that sums them, features of networks, projectors."""
