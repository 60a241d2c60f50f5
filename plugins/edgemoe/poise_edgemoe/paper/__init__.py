"""The paper's comparison: its baselines, EdgeMoE as in the paper and ours, under limits (section IV)."""
