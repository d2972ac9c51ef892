"""Faults on purpose: many writers, something breaks, and a checker that reads everything back.

`history` is the load, `checker` the laws, `stage` the servers, stores and the link between them;
`faults` is what can be done to them, `run` does it, and `soak` does it for as long as told.
`python -m tests.faults` is the command line behind `make faults` and `make soak`.
"""
