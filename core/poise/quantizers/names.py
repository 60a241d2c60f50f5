"""Names that options allow, without torch."""

KERNELS = ("auto", "reference", "c", "torch", "ggml")
