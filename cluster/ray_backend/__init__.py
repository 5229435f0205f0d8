"""The same client over a Ray cluster: plans run by Ray's actors, and pieces go as references."""
