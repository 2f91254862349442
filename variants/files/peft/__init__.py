"""PEFT's format.

names.py    the names of files, tensors and modules; no torch
config.py   what adapter_config.json says; no torch
writing.py  an adapter as PEFT's tensors and configuration
reading.py  an adapter out of them
checks.py   whether the tensors are all that the configuration promises
base.py     tensors of the frozen base among them
"""
