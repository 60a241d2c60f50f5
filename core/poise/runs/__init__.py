"""Poise's runs."""
