"""Poise's recipes."""
