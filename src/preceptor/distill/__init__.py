"""Distillation: loss functions, loss terms and the training task that sums them, features of networks, projectors."""

from preceptor.distill.loss_term import LossTerm

__all__ = ["LossTerm"]
