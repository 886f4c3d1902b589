"""Preceptor teaches small medical multimodal models from strong ones."""

__version__ = "0.1.0"
