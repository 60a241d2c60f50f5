"""Poise's report."""
