"""Scores, protocols, baselines and statistics: everything that turns predictions into numbers."""
