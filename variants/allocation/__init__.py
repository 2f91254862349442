"""Where rank goes: score x schedule x direction x cost, each a part of its own, and an exact choice of what to keep.

    score      what a slot is worth                        SCORES       sensitivity, magnitude, norm-share, gradient, ...
    schedule   how the total goes from start to target     SCHEDULES    cubic, cubic-late, linear, cosine, constant; on-plateau
    direction  which slots may change                      DIRECTIONS   prune, grow, both
    cost       what a slot takes out of the budget         one, or its parameters

`AllocatedAdapter` (variants/allocation/allocated.py) puts them together by name; any combination is a method.

Legend: K member, R rank slots of a site, S slots of all sites together.
"""
