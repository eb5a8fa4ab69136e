"""MiniVLA: fused DINOv2 + SigLIP, projector, Qwen2.5; actions as VQ tokens, or by OFT's decoding and L1 head."""
