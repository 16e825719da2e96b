"""Data: captioned images and cached latents in tar shards, in one deterministic,
resumable order.
"""
