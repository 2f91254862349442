"""The low-rank site that every method with a rank shares, and its products.

Rank's words, for one site and one member:

    rank      how many rank-one terms the update has; "active" where it is counted by a report
    slot      a place for one of them: a row of A, a column of B, a coefficient.  `slots` (K, R) says which exist for a member;
              R is that of the member with most, and what others lack is padding
    given     slots at the start
    nominal   the given ones, or those of now where there are more: the rank that was asked for
    physical  slots that parameters, gradients and averages are held for
    kept      (K, R): slots that the allocator chose; their number is the rank of a method that allocates
    live      slots that act on the output at this moment: between two allocations a cut one may, and a kept one may be zero
"""
