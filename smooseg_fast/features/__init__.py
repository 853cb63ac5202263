"""Frozen features on disk: made once by a backbone, kept as checked shards, shared between runs.

Imports go one way: store (what a shard is), cachefolder (who uses which store), job (what is made), batches (through
the backbone), extract (open what is on disk, make the rest), room (more features than the cache may hold).
"""
