"""Poise's quantizers."""
