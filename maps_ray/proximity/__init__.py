"""The method: order -> strengths, the per-tensor projection, and its sharded form under DeepSpeed ZeRO."""
