"""Carries certified unlearning plans out on torch. Importing this package does not import torch."""
