"""`rankwise bench`: how fast we are beside PEFT and beside the floor that the frozen model sets.

cases.py says what is measured and what it must reach; arms.py holds what is timed (ours, PEFT, the floors), workloads.py
the models and rows that they are timed on, timing.py the clock and the measure of memory; throughput.py counts whole runs
and whole studies; run.py makes the rows of the JSON.
`reports/speed.py` prints them.  ablation.py (--ablation) measures our own steps without each change that made them fast,
tried.py (--tried) what was not kept, quantised.py (--quantised) bases in 4 and 8 bits.
"""
