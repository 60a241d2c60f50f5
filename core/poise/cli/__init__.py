"""Poise's cli."""
