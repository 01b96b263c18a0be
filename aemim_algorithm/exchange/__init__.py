"""Trained models in the names and files of other libraries, out and in."""
