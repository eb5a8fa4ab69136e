"""OpenVLA-OFT: fused DINOv2 + SigLIP, projector, bidirectional Llama, L1 action head."""
