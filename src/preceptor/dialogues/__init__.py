"""Grounded vision-language models from recipe to report: ClinKD's stages."""
