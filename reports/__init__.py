"""Tables, figures, pages and verdicts, made from the files that runs wrote; nothing is trained, torch is not imported.

results reads the runs of a study; statistics, verdicts and stability compute from them; tables and figures show them; page
writes report.md and report.html.  ranks reads the ranks of any run or adapter, papers holds the published tables, analysis
and speed show what `rankwise analysis` and `rankwise bench` measured.  designs are tests whose error rate includes the choice
of the rate; calibration and simulation measure error rates.
"""
