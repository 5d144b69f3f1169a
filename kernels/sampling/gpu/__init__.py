"""Triton bodies of sampling."""
