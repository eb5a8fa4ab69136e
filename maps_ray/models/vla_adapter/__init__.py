"""VLA-Adapter: learned action queries in a causal Qwen2.5, and a policy that attends to every layer's hidden states."""
