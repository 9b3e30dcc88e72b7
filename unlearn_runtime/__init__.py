"""Carries certified unlearning plans out on torch."""
