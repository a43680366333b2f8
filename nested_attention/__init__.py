"""Concept personalization by nested attention (arXiv 2501.01407)."""

from nested_attention.uncollected import uncollected

with uncollected():
    from nested_attention.errors import Cancelled, NestedAttentionError
    from nested_attention.pipeline import Generation, NestedAttentionPipeline, Progress
    from nested_attention.subjects import Subject, SubjectCache
    from nested_attention.tracing import trace

__all__ = [
    "Cancelled", "Generation", "NestedAttentionError", "NestedAttentionPipeline", "Progress", "Subject", "SubjectCache", "trace",
]  # fmt: skip
