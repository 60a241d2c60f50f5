"""Names that options are checked against without importing torch."""

FUNCTION_NAMES = ("arctan", "erf", "arsinh", "tanh")  # in the order of the enum in kernel.c
