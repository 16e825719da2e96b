"""Data: captioned images and cached latents in tar shards, streamed in one deterministic, resumable
order.
"""
