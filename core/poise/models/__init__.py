"""Poise's models."""
