"""Tables, figures, pages and verdicts, made from the files that runs wrote; nothing is trained, torch is not imported."""
