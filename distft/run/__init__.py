"""From a configuration to a run: the only package that knows every part below it."""
