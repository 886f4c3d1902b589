"""Serve trained models on a local page and through a JSON API."""
