"""Keys and values of prefixes, kept across steps: what trainers and chats send again is not computed again."""

from marginrm.prefix_cache.cache import PrefixCache, StepPrefixes

__all__ = ["PrefixCache", "StepPrefixes"]
