"""Segmentation with missing modalities: cases, training, evaluation over every subset, prediction."""
