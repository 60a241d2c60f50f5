"""Poise's data."""
