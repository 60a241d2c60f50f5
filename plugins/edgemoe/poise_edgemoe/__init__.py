"""The edgemoe plugin of Poise."""
