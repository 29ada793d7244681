"""What a step needs, by arithmetic: memory of a rank and its host, storage, operations, time.

Nothing here imports torch: `python -m pipelines plan`, `compile` and `submit` ask before anything
is queued. Every formula is compared with what the real steps allocate (`tests/flagscale/sizes`);
`docs/sizes.md` says which were measured and which are arithmetic.
"""
