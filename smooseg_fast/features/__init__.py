"""Frozen features on disk: made once by a backbone, kept as shards that are checked, shared between runs and held below a limit.

Arrows go one way: store (what a shard is) and locks, cachefolder and turns (who may read and write), batches and produce (how shards are
made), extract (open what is there, make the rest), room and stream (more features than the cache may hold).
"""
