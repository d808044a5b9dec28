"""
What a round will cost: before anything runs, and without weights.

Bytes and FLOPs follow from shapes (``costs``); memory from one pass over a meta model under the
counter that a run has; seconds from speeds and links that ``[plan]`` names.
"""
