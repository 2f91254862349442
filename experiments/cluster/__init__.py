"""A study on several machines, over Ray: one process owns the study's folder, others train its packs.  ray.md says how.

    places.py    which machine gets the next worker (nothing but numbers)
    bundle.py    files as bytes, with a digest
    worker.py    trains packs in a folder of its own; knows no Ray
    driver.py    gives packs to workers and writes what comes back; knows no Ray
    pool.py      the cluster: Ray's part, and nothing else of Ray is anywhere

The driver alone decides, by the study's own order (study/order.py).  A worker sends every checkpoint and every finished run as
bytes, and the driver writes them where a run on this machine would have: so a pack whose worker is gone goes on elsewhere from
its last checkpoint, and the same command goes on without Ray, and the other way round.
"""
