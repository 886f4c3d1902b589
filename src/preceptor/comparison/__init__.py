"""Runs against each other on the same questions: groups over seeds, differences with intervals, learning curves."""
