"""A trained policy behind HTTP, for robots: Ray Serve and the protocol of OpenVLA-OFT's deployment."""
