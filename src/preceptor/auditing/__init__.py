"""Whether a data set can be trusted: duplicates, leaks, shortcuts, broken files, traces of patients."""
