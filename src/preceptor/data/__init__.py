"""Readers of data: one per data set, `table` for a user's own files, and what they share."""
