"""Poise's testing."""
