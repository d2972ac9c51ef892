"""The commands of the command line, a module a topic.

Results go to the standard output, everything said about them to the standard error. Exit codes:
see `exits`. `doctor` has its own: 0 all good, 1 warnings only, 2 something is bad, a server that
does not answer and a wrong configuration included. `verify` and `compare` tell apart what scripts
need: 0 nothing is wrong, 1 something is, 2 they could not look. `cluster start` stays until a
signal says stop, and that is all done: 0.
"""
