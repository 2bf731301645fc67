"""The command line: parse, call, print, exit code. Commands do their heavy imports when they run."""
