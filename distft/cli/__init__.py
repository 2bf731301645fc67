"""The command line: parse, call, print, exit code. Heavy imports wait until a verb runs."""
