"""Theorems that turn a noisy process into a privacy profile: one file, one theorem."""
