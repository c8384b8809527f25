"""Reproduce, attack and compare published defenses of vision-language models."""

__version__ = "0.1.0"
