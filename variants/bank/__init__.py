"""Many adapters on one frozen model: `variants.Bank`.

bank.py     what a user calls: load, use, remove, one forward pass or generation of mixed rows
owners.py   which adapter owns each row of a batch
site.py     the adapters at one module, and what each does to its own rows
updates.py  an adapter's change of one weight as a diagonal and two thin matrices, and weighted sums of them
combine.py  several adapters made into one: how they are summed
merging.py  TIES and DARE
saving.py   the result, and how it is written
"""
