"""Names that options are checked against without importing torch."""

FUNCTION_NAMES = ("arctan", "erf", "arsinh", "tanh")
