"""The method: order -> strengths, the per-tensor projection, and its sharded form under DeepSpeed ZeRO.

`schedule` and `stack` are plain Python; import `projection`, `adam_spd` and `zero` only where torch may be loaded.
"""
