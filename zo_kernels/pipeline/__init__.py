"""Preparation of the models that the package is measured on."""
